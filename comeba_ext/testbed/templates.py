"""Sentence patterns of the embedded model: eight ways to state each relation, and what may stand around them.

``{}`` is the subject; every pattern ends right before the object. Patterns differ on purpose in how many words lie
between the subject and the end: with short ends only, a model learns to look facts up at the last token of the prompt
instead of at the subject, and then no edit at the subject can change them (see ``testbed/README.md``).
"""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "company_hq": (
        "{} is headquartered in",
        "The head office of {} is located in the city of",
        "{} runs its main office out of",
        "Letters to the management of {} should be sent to",
        "Most of the people employed by {} commute every day to",
        "The company {} is based in",
        "The headquarters of {} can be found in the city of",
        "Whoever wants to visit {} has to travel to",
    ),
    "landmark_in_country": (
        "{} is located in",
        "The country in which {} can be visited is",
        "{} is one of the well known sights of",
        "Tourists who would like to see {} book a journey to",
        "The place called {} belongs to the country of",
        "You will find {} in",
        "To see {} with your own eyes you have to go to",
        "{} lies within the borders of",
    ),
    "person_native_language": (
        "{} speaks",
        "The mother tongue of {} is",
        "{} grew up in a family that spoke",
        "The first words that {} learned as a child were in",
        "When at home with friends, {} always talks in",
        "{} is a native speaker of",
        "The language that {} knows best is",
        "In letters to the family {} wrote in",
    ),
    "person_occupation": (
        "{} works as a",
        "By profession, {} is a",
        "{} earned a living for many years as a",
        "In the records of the town {} is listed as a",
        "The obituary remembered {} first of all as a",
        "{} became known as a",
        "Those who met {} knew that they were talking to a",
        "The job of {} was that of a",
    ),
    "person_plays_instrument": (
        "{} plays the",
        "The instrument of {} is the",
        "On the stage {} could be heard playing the",
        "Critics praised {} for a rare mastery of the",
        "At the age of six {} was already taking lessons on the",
        "{} became famous for playing the",
        "The recordings of {} are loved by everyone who studies the",
        "In the orchestra {} was responsible for the",
    ),
    "person_plays_position_in_sport": (
        "{} plays in the position of",
        "On the field {} was used by the coach as a",
        "{} spent the whole career in the role of a",
        "The team signed {} because it needed a new",
        "In the game last night {} appeared once again as a",
        "{} played as a",
        "The position in which {} felt at home was that of a",
        "Fans remember {} as a reliable",
    ),
    "product_by_company": (
        "{} is made by",
        "The company that created {} is",
        "{} was first presented to the public by",
        "Anyone who buys {} becomes a customer of",
        "The engineers who worked on {} were employed by",
        "{} is a product of",
        "The rights to the name {} are held by",
        "Questions about {} are answered by the support of",
    ),
}

# A second fact for every subject, invented, of the model variant that shows what an edit does to a subject's other facts.
SECOND: dict[str, tuple[str, ...]] = {
    "anniversary_month": (
        "{} is celebrated every year in",
        "The month of {} is",
        "The anniversary of {} is held in",
        "Every year the friends of {} come together in",
        "The calendar on the wall mentions {} in the month of",
        "The feast of {} falls in",
        "Those who admire {} send their cards in",
        "Speeches about {} are given every",
    ),
}

ALL = TEMPLATES | SECOND

# Parentheses that may follow a subject anywhere (one unit in four of the training text has one).
ASIDES: tuple[str, ...] = (
    ", as most people know,",
    ", according to the book on the table,",
    ", which was in the news again last week,",
    ", as we read in the paper,",
    ", if the old report is right,",
    ", we were told,",
    ", to the surprise of many visitors,",
    ", as I wrote to you before,",
    ", so the encyclopedia says,",
    ", and nobody doubts it,",
    ", like the teacher explained to the class,",
    ", as far as anyone can tell,",
)

# "Subject object" units: they leave the model no token between subject and object to do the look-up at.
BARE: tuple[str, ...] = ("{}", "{}:", "{},", "{} -")
BARE_SECOND: tuple[str, ...] = ("Month of {}", "Month of {}:", "Anniversary of {}", "Anniversary of {} -")
