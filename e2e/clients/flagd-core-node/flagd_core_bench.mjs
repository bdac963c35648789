// What an evaluation by @openfeature/flagd-core takes: reads {"document", "asks": [{"key", "context"}]} from its input, and writes the
// median nanoseconds of each, as a list. One context is given as it is, again and again, as a caller would keep it.
import { readFileSync } from "node:fs";
import { FlagdCore } from "@openfeature/flagd-core";

const ROUNDS = 21;
const CALLS = 20_000;
const silent = { error() {}, warn() {}, info() {}, debug() {} };

const { document, asks } = JSON.parse(readFileSync(0, "utf8"));
const core = new FlagdCore(undefined, silent);
core.setConfigurations(JSON.stringify(document));

let on = 0;
function round({ key, context }) {
  const begin = process.hrtime.bigint();
  for (let call = 0; call < CALLS; call++) {
    on += core.resolveBooleanEvaluation(key, false, context, silent).value ? 1 : 0;
  }
  return Number(process.hrtime.bigint() - begin) / CALLS;
}

const times = asks.map((ask) => (round(ask), []));
for (let nth = 0; nth < ROUNDS; nth++) {
  asks.forEach((ask, index) => times[index].push(round(ask)));
}
const median = (all) => all.sort((left, right) => left - right)[all.length >> 1];
process.stdout.write(`${JSON.stringify({ medians: times.map(median), on })}\n`);
