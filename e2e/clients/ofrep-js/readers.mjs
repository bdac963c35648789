// What a call asks for, by its type: both SDKs have the same names for it.

/** The functions of a client that read a flag and say why it has its value. */
export function readers(client) {
  return {
    boolean: (...call) => client.getBooleanDetails(...call),
    string: (...call) => client.getStringDetails(...call),
    number: (...call) => client.getNumberDetails(...call),
    object: (...call) => client.getObjectDetails(...call),
  };
}
