"""A program with the OpenFeature SDK and its provider for OFREP, as a test drives it: a line of JSON in, one out."""

import json
import logging
import sys

from openfeature import api
from openfeature.contrib.provider.ofrep import OFREPProvider
from openfeature.evaluation_context import EvaluationContext

base_url, token = sys.argv[1:3]
# It logs each flag that is not found.
logging.disable(logging.CRITICAL)
api.set_provider(OFREPProvider(base_url, headers_factory=lambda: {"Authorization": f"Bearer {token}"}))
client = api.get_client()
READ = {
    "boolean": client.get_boolean_details,
    "string": client.get_string_details,
    "number": client.get_float_details,
    "integer": client.get_integer_details,
    "object": client.get_object_details,
}


def answer(call):
    attributes = dict(call.get("context") or {})
    context = EvaluationContext(attributes.pop("targetingKey", None), attributes)
    details = READ[call["type"]](call["key"], call["fallback"], context)
    return {
        "value": details.value,
        "variant": details.variant,
        "reason": details.reason,
        "errorCode": details.error_code,
        "errorMessage": details.error_message,
        "flagMetadata": details.flag_metadata,
    }


print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    print(json.dumps([answer(call) for call in json.loads(line)]), flush=True)
