// A web page with the OpenFeature SDK and its provider for OFREP, as a browser loads it.

import { OpenFeature } from "@openfeature/web-sdk";
import { OFREPWebProvider } from "@openfeature/ofrep-web-provider";
import { readers } from "./readers.mjs";

const read = readers(OpenFeature.getClient());

window.start = ({ baseUrl, token }) => {
  const headers = [["Authorization", `Bearer ${token}`]];
  return OpenFeature.setProviderAndWait(new OFREPWebProvider({ baseUrl, headers, cacheMode: "disabled" }));
};

/** A page has one context at a time; it is set only where it is another one, for each time asks the server anew. */
window.read = async (calls) => {
  const answers = [];
  for (const { type, key, fallback, context } of calls) {
    if (context !== undefined && JSON.stringify(context) !== JSON.stringify(OpenFeature.getContext())) {
      await OpenFeature.setContext(context);
    }
    answers.push(read[type](key, fallback));
  }
  return answers;
};
