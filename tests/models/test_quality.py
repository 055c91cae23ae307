"""The default model with its weights as the file has them: float32's perplexity from the same file, within 0.5 %."""

import sys
from pathlib import Path

import pytest

from liushui.kernels.ops import load_ops

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(load_ops("auto", 1).name != "native", reason="the native library is not built"),
]


def test_perplexity_is_kept(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    try:
        import quality

        exact, _ = quality.measure(str(smollm2), "float32", "float32", None)
        for form in ("native", "int8"):
            found, report = quality.measure(str(smollm2), form, "float32", None)
            assert any(line.startswith("weights:") for line in report)
            for language in quality.LANGUAGES:
                change = found[language].perplexity / exact[language].perplexity - 1
                assert change != 0  # it is another arithmetic
                assert abs(change) < 0.005, (form, language)
                assert found[language].agreement(exact[language]) > (0.99 if form == "native" else 0.9)
    finally:
        sys.modules.pop("quality", None)
