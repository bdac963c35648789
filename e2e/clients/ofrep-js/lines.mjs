// How a test drives a client: a line of JSON in, a line of JSON out, in order.

import { createInterface } from "node:readline";

/** Answers each line with what `handle` makes of it, until the input ends. */
export async function serve(handle) {
  console.log(JSON.stringify("ready"));
  for await (const line of createInterface({ input: process.stdin })) {
    console.log(JSON.stringify(await handle(JSON.parse(line))));
  }
}

/** What is asked for: where, and with which token. */
export function target() {
  const [baseUrl, token] = process.argv.slice(2);
  return { baseUrl, token };
}
