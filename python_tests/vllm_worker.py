"""What a process with vLLM does for :mod:`test_vllm`: ``vllm_worker.py MODEL ASKED.json OUT.json``, one answer for every question in order.

``ASKED.json`` has the ``engine``'s options and ``rounds`` of questions that are asked at once: token ids ``prompt``, how many ``new`` ones,
and ``forced``, the only token that may be written. Answers: the tokens; log probabilities of those behind the prompt's first one, of which
prompts only have them if ``whole``; the ``likely`` token at every step and its log probability; how many tokens were ``cached``.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def answer(asked, found):
    (own,) = found.outputs
    steps = [at[token].logprob for at, token in zip(own.logprobs, own.token_ids)]
    if asked["whole"]:
        steps = [at[token].logprob for at, token in zip(found.prompt_logprobs[1:], asked["prompt"][1:])] + steps
    likely = [max((seen.logprob, token) for token, seen in at.items()) for at in own.logprobs]
    return {"tokens": list(own.token_ids), "logprobs": steps, "likely": likely, "cached": found.num_cached_tokens or 0}


def main(model: str, asked: str, out: str) -> None:
    from vllm import LLM, SamplingParams

    given = json.loads(Path(asked).read_text())
    engine = {"enforce_eager": True, "dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True, "block_size": 32}
    engine["disable_log_stats"] = False
    try:
        llm = LLM(model, **(engine | given["engine"]))
    except Exception as error:
        Path(out).write_text(json.dumps({"refused": str(error)}))
        return
    answers = []
    for questions in given["rounds"]:
        how = [
            SamplingParams(
                temperature=0,
                max_tokens=own["new"],
                ignore_eos=True,
                detokenize=False,
                logprobs=1,
                prompt_logprobs=0 if own["whole"] else None,
                allowed_token_ids=None if own["forced"] is None else [own["forced"]],
            )
            for own in questions
        ]
        found = llm.generate([{"prompt_token_ids": own["prompt"]} for own in questions], how, use_tqdm=False)
        answers += [answer(*pair) for pair in zip(questions, found)]
    begun_again = sum(own.value for own in llm.get_metrics() if own.name == "vllm:num_preemptions")
    Path(out).write_text(json.dumps({"answers": answers, "begun_again": begun_again}))


if __name__ == "__main__":
    main(*sys.argv[1:])
