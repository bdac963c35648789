// Follows flags with the in-process provider of flagd, and evaluates those that it is asked for.
//
//   node client.mjs HOST PORT SELECTOR [CERTIFICATE]
//
// With the file of a certificate that it trusts it speaks TLS.
//
// Each line of the input is a question, {"type": "boolean", "key": "…", "fallback": false, "context": {}}; each line of the output is
// an answer, {"details": …}, or something that happened, {"event": "ready", …}.

import { createInterface } from 'node:readline';
import { FlagdProvider } from '@openfeature/flagd-provider';
import { OpenFeature, ProviderEvents } from '@openfeature/server-sdk';

const [host, port, selector, certPath] = process.argv.slice(2);

function tell(message) {
  process.stdout.write(`${JSON.stringify(message)}\n`);
}

OpenFeature.addHandler(ProviderEvents.Stale, () => tell({ event: 'stale' }));
OpenFeature.addHandler(ProviderEvents.ConfigurationChanged, ({ flagsChanged }) => tell({ event: 'changed', flagsChanged }));

const provider = new FlagdProvider({
  resolverType: 'in-process',
  host,
  port: Number(port),
  selector,
  ...(certPath ? { tls: true, certPath } : {}),
  deadlineMs: 10_000,
  // After an error it waits that long before it connects again.
  retryBackoffMs: 250,
  retryBackoffMaxMs: 250,
  retryGracePeriod: 120,
});

await OpenFeature.setProviderAndWait(provider);
const client = OpenFeature.getClient();
tell({ event: 'ready' });

const evaluate = {
  boolean: client.getBooleanDetails.bind(client),
  string: client.getStringDetails.bind(client),
  number: client.getNumberDetails.bind(client),
  object: client.getObjectDetails.bind(client),
};

for await (const line of createInterface({ input: process.stdin })) {
  const { type, key, fallback, context } = JSON.parse(line);
  tell({ details: await evaluate[type](key, fallback, context) });
}
await OpenFeature.close();
