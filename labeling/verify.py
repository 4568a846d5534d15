"""Stage verify: neutral or divergent, for each fork of an answer."""

from labeling.batch import Ask, Job, Task, Write, Written
from labeling.continue_ import Fork
from labeling.respond import Response
from labeling.schema import Label
from labeling.setting import Setting
from labeling.verifiers import Verdict, by_answer, by_difference, by_verdicts, judge_prompts
from r2r_glimp.core import RoutingParams, SamplingParams


def verify(response: Response, forks: list[Fork], setting: Setting) -> Task[list[Verdict]]:
    """A verdict on each fork, by the configured verifier."""
    kind = setting.config.verifier.kind
    if kind == "answer":
        return [by_answer(fork) for fork in forks]
    if kind == "identical":
        return [by_difference(fork) for fork in forks]
    return (yield from _judge(response, forks, setting))


def _judge(response: Response, forks: list[Fork], setting: Setting) -> Task[list[Verdict]]:
    prompts = [_prompts(response, fork, setting) for fork in forks]
    jobs = [_job(prompt, response, setting) for asked in prompts for prompt in asked]
    results = iter((yield jobs) if jobs else [])
    verdicts = []
    for asked in prompts:
        answers = [_text(next(results), setting) for _ in asked]
        verdicts.append(by_verdicts(answers) if asked else Verdict(Label.NEUTRAL))
    return verdicts


def _prompts(response: Response, fork: Fork, setting: Setting) -> list[str]:
    if fork.slm.text == fork.llm.text:
        return []  # the same text in other tokens needs no judge
    config = setting.config.verifier.judge
    before = "".join(response.pieces[: fork.position])
    return judge_prompts(
        fork,
        response.question.prompt,
        before,
        both_orders=config.both_orders,
        context_chars=config.context_chars,
    )


def _job(prompt: str, response: Response, setting: Setting) -> Job:
    """A question to the endpoint or another model, or to the pair's own LLM on the same engine."""
    config = setting.config.verifier.judge
    if config.model is not None:
        return Ask(prompt)
    return Write(
        stage="verify",
        where=f"{response.where}, judged by the LLM",
        prompt=setting.encode(prompt, f"{response.where}, asking the judge"),
        sampling=SamplingParams(max_tokens=config.max_tokens, seed=0),
        routing=RoutingParams(router="llm"),
    )


def _text(result: str | Written, setting: Setting) -> str:
    return setting.text(result.tokens) if isinstance(result, Written) else result
