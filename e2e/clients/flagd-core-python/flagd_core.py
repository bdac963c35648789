"""Answers for flags as openfeature-flagd-core does. For input and output see flagd_core.mjs."""

import json
import logging
import math
import sys
import time

from openfeature.contrib.tools.flagd.core import FlagdCore
from openfeature.evaluation_context import EvaluationContext
from openfeature.exception import OpenFeatureError

logging.disable(logging.CRITICAL)

METHODS = {
    "boolean": FlagdCore.resolve_boolean_value,
    "string": FlagdCore.resolve_string_value,
    "number": FlagdCore.resolve_float_value,
    "object": FlagdCore.resolve_object_value,
}


def failed(error):
    code = error.error_code.value if isinstance(error, OpenFeatureError) else "GENERAL"
    return {"value": None, "variant": None, "reason": "ERROR", "error": code}


def answer(core, ask):
    context = dict(ask["context"])
    targeting_key = context.pop("targetingKey", None)
    try:
        found = METHODS[ask["type"]](core, ask["key"], None, EvaluationContext(targeting_key, context))
    # Whatever a rule makes it raise.
    except Exception as error:
        return failed(error)
    value = None if isinstance(found.value, float) and not math.isfinite(found.value) else found.value
    reason = getattr(found.reason, "value", found.reason)
    return {"value": value, "variant": found.variant, "reason": reason, "error": None}


def answers(document, now, asks):
    time.time = lambda: now
    core = FlagdCore()
    try:
        core.set_flags(json.dumps(document))
    except Exception as error:
        return [failed(error) for _ in asks]
    return [answer(core, ask) for ask in asks]


for line in sys.stdin:
    print(json.dumps(answers(**json.loads(line))))
