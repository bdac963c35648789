// A server with the OpenFeature SDK and its provider for OFREP.

import { OpenFeature } from "@openfeature/server-sdk";
import { OFREPProvider } from "@openfeature/ofrep-provider";
import { serve, target } from "./lines.mjs";

const { baseUrl, token } = target();
await OpenFeature.setProviderAndWait(new OFREPProvider({ baseUrl, headers: [["Authorization", `Bearer ${token}`]] }));
const client = OpenFeature.getClient();
const read = {
  boolean: (...call) => client.getBooleanDetails(...call),
  string: (...call) => client.getStringDetails(...call),
  number: (...call) => client.getNumberDetails(...call),
  object: (...call) => client.getObjectDetails(...call),
};

await serve(async (calls) => {
  const answers = [];
  for (const { type, key, fallback, context } of calls) {
    answers.push(await read[type](key, fallback, context));
  }
  return answers;
});
process.exit(0);
