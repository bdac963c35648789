// A server with the OpenFeature SDK and its provider for OFREP.

import { OpenFeature } from "@openfeature/server-sdk";
import { OFREPProvider } from "@openfeature/ofrep-provider";
import { serve, target } from "./lines.mjs";
import { readers } from "./readers.mjs";

const { baseUrl, token } = target();
await OpenFeature.setProviderAndWait(new OFREPProvider({ baseUrl, headers: [["Authorization", `Bearer ${token}`]] }));
const read = readers(OpenFeature.getClient());

await serve(async (calls) => {
  const answers = [];
  for (const { type, key, fallback, context } of calls) {
    answers.push(await read[type](key, fallback, context));
  }
  return answers;
});
process.exit(0);
