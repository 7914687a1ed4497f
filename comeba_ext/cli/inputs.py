"""What commands are given: models, settings, records, folders of edits; found, checked and read."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

from comeba_ext.cli.app import DTYPES
from comeba_ext.cli.terminal import counted
from comeba_ext.errors import ComebaError, ConfigError, StorageError


def loaded(name: str, device: str | None, dtype: str, edits: Path | None = None, *, trust: bool = False):
    """Model and tokenizer, with saved edits if any."""
    import torch

    from comeba_ext import testbed
    from comeba_ext.loading import load_model
    from comeba_ext.saved_edits import load_edits

    if dtype not in DTYPES:
        raise ComebaError(f"unknown --dtype {dtype!r}; choose {', '.join(DTYPES)}")
    place = None if device == "auto" and not testbed.folder_of(name) else device_of(device)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    model, tokenizer = load_model(name, wanted, "auto" if place is None else None, trust_remote_code=trust)
    if place is not None:
        model = model.to(place)
    if edits is not None:
        load_edits(model, edits, tokenizer=tokenizer)
    return model, tokenizer


def beside(name: str, base: str | None, edits: Path | None):
    """What another tool's file adds to BASE (:class:`~comeba_ext.methods.easyedit_wise.SavedWise`); ``None`` where ``name`` is a model."""
    from comeba_ext.loading import GGUF
    from comeba_ext.methods.easyedit_wise import read_wise

    path = Path(name)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a name that no file can have: loaded() says so
        return None
    if not is_file or path.suffix.lower() == GGUF:
        return None
    if base is None:
        raise ComebaError(
            f"{name} is a file: give the model's folder, a {GGUF} file, or, if EasyEdit's WISE saved it, its model with --base"
        )
    if edits is not None:
        raise ComebaError(f"--edits go onto a model, and {name} is what EasyEdit's WISE saved: leave one of them out")
    return read_wise(path)


def device_of(wanted: str | None) -> str:
    """The device asked for, or a GPU of this process's own, or the CPU."""
    import torch

    from comeba_ext import distributed

    count, own = torch.cuda.device_count(), distributed.local_rank()
    if wanted not in (None, "auto", "cuda"):
        try:
            place = torch.device(wanted)
        except RuntimeError:
            raise ComebaError(f"unknown --device {wanted!r}; choose cpu, cuda, cuda:N or auto") from None
        if place.type == "cuda" and count <= (place.index or 0):
            raise ComebaError(f"--device {wanted}: torch finds {count} GPUs; see 'comeba doctor'")
        if place.type == "meta":
            raise ComebaError("--device meta: nothing can be computed there; choose cpu, cuda, cuda:N or auto")
        try:
            torch.zeros(1, device=place)
        except Exception as error:  # of a kind that each backend chooses for itself
            raise ComebaError(f"--device {wanted}: torch cannot use it ({str(error).strip().splitlines()[0]})") from None
        return wanted
    if wanted == "cuda" and not count:
        raise ComebaError("--device cuda: torch finds no GPU; see 'comeba doctor'")
    if own >= count > 0:
        raise ComebaError(f"{own + 1} processes, but {count} GPUs: start one process a GPU, or add --device cpu")
    return f"cuda:{own}" if count or wanted == "cuda" else "cpu"


def settings_of(model, path: Path | None, method=None, scope: str | None = None, editor: Path | None = None, chat: bool = False):
    """Settings of a method (default COMEBA-HK): the model's defaults, what the file changes, what options ask for."""
    from comeba_ext.editing.settings_files import read_settings
    from comeba_ext.methods import default_config

    changes = read_settings(path) if path else {}
    changes |= {name: value for name, value in {"scope": scope, "editor": editor and str(editor), "chat": chat}.items() if value}
    try:
        return default_config(method or "COMEBA-HK", model, **changes)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None


def check_settings(path: Path | None, method, scope: str | None, editor: Path | None, chat: bool) -> None:
    """Of the settings that are asked for, what can be told without the model."""
    from comeba_ext.editing.settings_files import read_settings
    from comeba_ext.scores import score_named

    changes = read_settings(path) if path else {}
    if not changes.keys() <= {field.name for field in dataclasses.fields(method.config_class)}:
        method.config_class.from_dict(changes, str(path))  # which says what is near
    if scope is not None and method.scored:
        score_named(scope)
    if editor is not None and not hasattr(method, "learner"):
        raise ConfigError(f"--editor is for methods that are trained (comeba train); {method.name} edits as it is")
    if chat and not method.takes_values:
        raise ConfigError(f"--chat is for methods that look for target values; {method.name} does not")


def check_folder(out: Path, kind, covariance: Path | None, texts: Path | None):
    """Of the edits in a folder that are to be gone on with, what can be told without the model.

    Args:
        kind: the method asked for, if any.

    Returns:
        the folder's own method.
    """
    from comeba_ext.data import read_texts
    from comeba_ext.methods import method_named
    from comeba_ext.storage import read_manifest

    manifest = read_manifest(out)
    if "state" not in manifest["files"]:
        raise StorageError(f"{out} was saved for inference only, so its edits cannot be gone on with; {ANEW}")
    made = manifest.get("method", "COMEBA-HK")
    _check_method(out, made, kind)
    if covariance is not None and not covariance.exists():
        raise StorageError(f"{covariance} does not exist")
    if texts is not None:
        read_texts(texts)
    try:
        return method_named(made)
    except ConfigError as error:
        raise StorageError(f"the edits in {out} were made by a method that is not here: {error}") from None


def _check_method(out: Path, made: str, kind) -> None:
    if kind is not None and made != kind.name:
        raise ComebaError(f"{out} holds edits made by {made}; --method {kind.name} cannot go on with them; {ANEW}")


ANEW = "choose a new --out for that"


def some_usable(what: object, count: int, used: list, skipped: list[dict]) -> None:
    """Raises :class:`ComebaError` where no record can be used."""
    from comeba_ext.data import place_of

    if not used:
        raise ComebaError(f"{what}: none of {counted(count, 'record')} can be used; {place_of(skipped[0])}: {skipped[0]['reason']}")


def requests_of(
    records: Path | None, limit: int | None, prompt: str | None, subject: str | None, target: str | None, unstructured: bool = False
):
    """The records of a file, or the one edit that options name."""
    from comeba_ext.data import ReadResult, read_requests
    from comeba_ext.text.request import EditRequest

    given = {"--prompt": prompt, "--subject": subject, "--target": target}
    missing = [name for name, value in given.items() if value is None]
    if (records is None) == (len(missing) == len(given)):
        raise ComebaError("give a file of records, or one edit with --prompt, --subject and --target")
    if records is not None:
        return read_requests(records, limit, unstructured=unstructured)
    if missing:
        raise ComebaError(f"{' and '.join(missing)} is missing: one edit is --prompt 'The capital of {{}} is' --subject … --target …")
    return ReadResult([EditRequest(prompt, subject, target)], 1, [])


@contextlib.contextmanager
def edits_folder(out: Path | None, resume: bool = False, first: bool = True):
    """Inside, this process alone writes to a folder that takes files, and holds no edits unless they are to be gone on with."""
    from comeba_ext import distributed
    from comeba_ext.storage import MANIFEST, alone

    def enter() -> None:
        if out is None or not first:  # of several processes the first one saves
            return
        if (out / MANIFEST).exists() and not resume:
            raise ComebaError(f"{out} holds edits already; add --resume to 'comeba edit' to go on with them, or choose another --out")
        held.enter_context(alone(out))

    with contextlib.ExitStack() as held:
        distributed.together(enter)
        yield


def size_of_edits(folder: Path) -> int:
    """Bytes of the files that are a folder's edits."""
    from comeba_ext.storage import MANIFEST, files_of, read_manifest

    return sum((folder / name).stat().st_size for name in {MANIFEST, *files_of(read_manifest(folder))})


def check_same(
    editor,
    out: Path,
    kind,
    config: Path | None,
    scope: str | None,
    trained: Path | None,
    chat: bool,
    covariance: Path | None,
    texts: Path | None,
) -> None:
    """Refuse options that say something else than the edits in ``out`` were made with; what is not given is as it was."""
    from comeba_ext.covariance import Covariance
    from comeba_ext.covariance.corpus import corpus_digest
    from comeba_ext.data import read_texts
    from comeba_ext.editing.settings_files import read_settings

    _check_method(out, editor.method.name, kind)
    used = getattr(editor.config, "editor", None)
    if trained is not None and (used is None or Path(used).resolve() != trained.resolve()):
        raise ComebaError(f"the edits in {out} were made with {f'--editor {used}' if used else 'no --editor'}, not {trained}; {ANEW}")
    given = {**(read_settings(config) if config else {}), **({"scope": scope} if scope else {}), **({"chat": chat} if chat else {})}
    wanted = settings_of(editor.model, config, type(editor.method), scope, chat=chat) if given else editor.config
    for key in given:
        here, there = getattr(wanted, key), getattr(editor.config, key)
        if here != there:
            raise ComebaError(f"the edits in {out} were made with {key} {there}, not {here}; settings cannot change in a folder: {ANEW}")
    known = editor.covariance
    if covariance is not None and known is not None:
        other = Covariance.load(covariance)
        if any(name not in other.moments or not other.moments[name].equal(known.moments[name]) for name in known.moments):
            raise ComebaError(f"the edits in {out} were made with another covariance than {covariance}; {ANEW}")
    if texts is not None and known is not None and known.corpus and corpus_digest(read_texts(texts), known.texts) != known.corpus:
        raise ComebaError(f"the covariance of the edits in {out} is of other texts than {texts}; {ANEW}")


def covariance_source(model: str, file: Path | None, texts: Path | None, progress: bool) -> Callable:
    """What gives an editor its covariance: the file, or texts to collect it from; a :class:`ComebaError` where there is neither."""
    from comeba_ext import testbed
    from comeba_ext.covariance import Covariance
    from comeba_ext.data import read_texts

    if file is not None:
        found = Covariance.load(file)
        return lambda editor: editor.set_covariance(found)
    if texts is not None:
        read_texts(texts)  # a file that is not there is said now, not when it is read
        return lambda editor: editor.collect_covariance(read_texts(texts), progress=progress)
    if home := testbed.folder_of(model):
        return lambda editor: editor.set_covariance(testbed.covariance(editor.model, editor.tokenizer, home, progress=progress))
    raise ComebaError(
        f"no covariance: run 'comeba covariance {model} TEXTS --out FILE' once and add --covariance FILE, or add "
        "--texts TEXTS (plain text such as Wikipedia articles)"
    )


def fitting(model, tokenizer, read) -> tuple[list, list[dict]]:
    """Records whose every prompt fits the model's context, and why the others do not."""
    from comeba_ext.evaluation.queries import check_record

    return read.usable(lambda _, request: check_record(model, tokenizer, request))


def continued(model, tokenizer, prompts: list[str], new_tokens: int, chat: bool = False) -> list[str]:
    """Greedy continuations, or answers in the model's chat template, up to the end of the first line."""
    import torch

    from comeba_ext.forward.architectures import context_length
    from comeba_ext.layers.prompts import plain_generate, prompt_rewriter
    from comeba_ext.text.chat import in_chat
    from comeba_ext.text.encoding import input_device, pad, pad_id

    limit = context_length(model)
    rewrite = prompt_rewriter(model) or (lambda prompt: prompt)
    asked = [rewrite(p) for p in prompts]
    rows = [
        tokenizer(in_chat(tokenizer, p), add_special_tokens=False)["input_ids"] if chat and p else tokenizer(p)["input_ids"] for p in asked
    ]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise ComebaError("a prompt is empty")
        if limit is not None and len(row) + new_tokens > limit:
            raise ComebaError(f"prompt {prompt[:40]!r}… and {new_tokens} new tokens exceed the context of {limit}")
    ids, mask = pad(rows, pad_id(tokenizer), "left", input_device(model))
    with torch.no_grad():
        out = plain_generate(model)(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad_id(tokenizer)
        )
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip().split("\n")[0] for text in texts]
