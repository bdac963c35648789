// Answers for flags as @openfeature/flagd-core does. Each line of the input is
// {"document": a flagd document, "now": seconds, "asks": [{"key", "type", "context"}]}, and each line of the output has the answers to
// one: [{"value", "variant", "reason", "error"}].
import { createInterface } from "node:readline";
import { FlagdCore } from "@openfeature/flagd-core";

const silent = { error() {}, warn() {}, info() {}, debug() {} };
const methods = {
  boolean: "resolveBooleanEvaluation",
  string: "resolveStringEvaluation",
  number: "resolveNumberEvaluation",
  object: "resolveObjectEvaluation",
};

function answer(core, { key, type, context }) {
  try {
    const { value, variant, reason, errorCode } = core[methods[type]](key, undefined, context, silent);
    return { value: value ?? null, variant: variant ?? null, reason, error: errorCode ?? null };
  } catch (error) {
    return { value: null, variant: null, reason: "ERROR", error: error.code ?? "GENERAL" };
  }
}

function answers({ document, now, asks }) {
  Date.now = () => now * 1000;
  const core = new FlagdCore(undefined, silent);
  try {
    core.setConfigurations(JSON.stringify(document));
  } catch (error) {
    return asks.map(() => ({ value: null, variant: null, reason: "ERROR", error: error.code ?? "GENERAL" }));
  }
  return asks.map((ask) => answer(core, ask));
}

for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(`${JSON.stringify(answers(JSON.parse(line)))}\n`);
}
