"""How good is an answer: verifiers of what a vision-language model writes, and an adapter that runs them.

    from rewards.verifiers import Answer, Verifiers

    def polite(response, word="please"):                        # any function whose first parameter is `response`
        return float(word in response.lower())

    judge = Verifiers([{"use": "verifiers.math", "when": {"source": ["geometry3k"]}}, {"use": polite, "weight": 0.1}])
    result = judge([Answer("so <answer>42</answer>, please", meta={"answer": "42", "source": "geometry3k"})])
    result.total                                                 # [N]; NaN = no verdict

A new verifier is one file: see `rewards.verifiers.types` for what it gets and returns, `rewards.verifiers.names` for
how it is named, and `rewards.verifiers.adapter` for routing, weights, gates and failures. They judge text, so they are
no rewards of media and `rewards.available()` does not list them: `rewards.verifiers.available()` does.
"""

from rewards.verifiers.adapter import Verified, Verifiers
from rewards.verifiers.names import available, build, resolve
from rewards.verifiers.types import Answer, NoVerdict, Verdict, verifier

__all__ = ["Answer", "NoVerdict", "Verdict", "Verified", "Verifiers", "available", "build", "resolve", "verifier"]
