// flagd's evaluator for Node behind a plain HTTP server, for a benchmark: single evaluations as OFREP has them, and nothing else.
//
//   node flagd_core_server.mjs DOCUMENT PORT

import { createServer } from "node:http";
import { readFileSync } from "node:fs";
import { FlagdCore } from "@openfeature/flagd-core";

const [document, port] = process.argv.slice(2);
const silent = { error() {}, warn() {}, info() {}, debug() {} };
const core = new FlagdCore(undefined, silent);
core.setConfigurations(readFileSync(document, "utf8"));

createServer((request, response) => {
  let body = "";
  request.on("data", (part) => (body += part));
  request.on("end", () => {
    const key = decodeURIComponent(request.url.split("/").pop());
    const { value, variant, reason } = core.resolveBooleanEvaluation(key, false, JSON.parse(body).context, silent);
    response.setHeader("content-type", "application/json").end(JSON.stringify({ key, value, variant, reason }));
  });
}).listen(Number(port), "127.0.0.1");
