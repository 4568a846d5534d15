"""A router's model card, written from its config: what it is, what it scored, how to use it."""

import re
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PAPERS = {
    "token": "[R2R](https://arxiv.org/abs/2505.21600)",
    "step": "[GlimpRouter](https://arxiv.org/abs/2601.05110)",
}


def render_card(config: dict[str, Any], name: str | None = None) -> str:
    """The text of README.md.

    Args:
        config: the JSON form of a `RouterConfig`.
        name: the Hub id or folder to name in the examples; None says "PATH".
    """
    from huggingface_hub import ModelCardData

    slm, llm = _model_name(config["slm"]), _model_name(config["llm"])
    dataset = str(config["trained_on"].get("dataset", ""))
    metadata = ModelCardData(
        base_model=[model for model in (slm, llm) if _is_hub_id(model)] or None,
        datasets=[dataset] if _is_hub_id(dataset) else None,
        library_name="r2r_glimp",
        pipeline_tag="text-generation",
        tags=["router", "r2r_glimp", f"{config['granularity']}-router"],
    )
    sections = (
        f"---\n{metadata.to_yaml()}\n---",
        _introduction(config, slm, llm),
        _usage(config, slm, llm, name or "PATH"),
        _thresholds(config),
        _facts("Results on the test split", config["metrics"]),
        _facts("Trained on", {k: v for k, v in config["trained_on"].items() if k != "command"}),
        _command(config["trained_on"].get("command")),
        _pair(config),
        _facts("Made with", config["versions"]),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _introduction(config: dict[str, Any], slm: str, llm: str) -> str:
    granularity = config["granularity"]
    unit = "token" if granularity == "token" else "reasoning step"
    seen = [name for name, value in config["features"].items() if value and name != "hidden_size"]
    size = config["network"]
    untrained = (
        "\n\n**Untrained**: written by a dry run, its scores mean nothing."
        if config["trained_on"].get("untrained")
        else ""
    )
    return (
        f"# {granularity.capitalize()} router: {slm} + {llm}\n\n"
        f"Decides at every {unit} whether `{slm}` goes on writing or `{llm}` takes over, in the "
        f"manner of {_PAPERS[granularity]}. Made with r2r_glimp.\n\n"
        f"It sees one row of the small model ({', '.join(seen)}) and gives the probability that "
        "the small model's choice there changes the path: an MLP of "
        f"{size['blocks']} residual blocks, {size['width']} wide."
        f"{untrained}"
    )


def _usage(config: dict[str, Any], slm: str, llm: str, name: str) -> str:
    return (
        "## How to use\n\n"
        "```python\n"
        "from r2r_glimp import Engine, ModelPair, load_router\n\n"
        f'pair = ModelPair.from_pretrained(slm="{slm}", llm="{llm}")\n'
        f'engine = Engine(pair, router=load_router("{name}"))\n'
        'print(engine.generate(["..."])[0].text)\n'
        "```\n\n"
        "The router is refused on any other small model. Its default threshold is "
        f"`{config['default_threshold']}`; `RoutingParams(threshold=...)` sets another."
    )


def _thresholds(config: dict[str, Any]) -> str:
    lines = [
        "## Thresholds",
        "",
        "| name | threshold | LLM share | recall | precision | calibrated on |",
        "|---|---|---|---|---|---|",
    ]
    for name, t in config["thresholds"].items():
        share = _percent(t["llm_share"])
        if t["llm_share_low"] is not None and t["llm_share_high"] is not None:
            share += f" ({_percent(t['llm_share_low'])} to {_percent(t['llm_share_high'])})"
        lines.append(
            f"| {name} | {t['value']:.6g} | {share} | {_percent(t['recall'])} "
            f"| {_percent(t['precision'])} | {t['calibrated_on']} |"
        )
    return "\n".join(lines)


def _pair(config: dict[str, Any]) -> str:
    keys = (
        "revision",
        "architecture",
        "hidden_size",
        "num_layers",
        "vocab_size",
        "tokenizer_sha256",
        "adapters",
    )
    lines = ["## The pair", "", "| | small | large |", "|---|---|---|"]
    slm, llm = config["slm"] or {}, config["llm"] or {}
    lines.append(f"| name | {_model_name(config['slm'])} | {_model_name(config['llm'])} |")
    for key in keys:
        if slm.get(key) or llm.get(key):
            length = 12 if key.endswith("sha256") else None
            lines.append(
                f"| {key} | {_cell(slm.get(key), length)} | {_cell(llm.get(key), length)} |"
            )
    return "\n".join(lines) if slm or llm else ""


def _command(command: Any) -> str:
    return f"## Command\n\n```bash\n{command}\n```" if command else ""


def _facts(title: str, facts: dict[str, Any]) -> str:
    if not facts:
        return ""
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    return f"## {title}\n\n| | |\n|---|---|\n{rows}"


def _model_name(fingerprint: dict[str, Any] | None) -> str:
    """A name fit for others to read: an absolute path says only where it lay on one machine."""
    if fingerprint is None:
        return "unknown"
    name = str(fingerprint.get("name_or_path") or "unknown")
    return name.rstrip("/").rsplit("/", 1)[-1] if name[0] in "/~." else name


def _is_hub_id(name: str) -> bool:
    """Whether a name leads somewhere on the Hub; a folder of the same form does not."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}%"


def _cell(value: Any, length: int | None = None) -> str:
    """A value as it stands in a table, cut after `length` characters."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return " ".join(text[:length].split()).replace("|", "\\|")
