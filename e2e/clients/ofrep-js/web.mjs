// A headless browser with a page that reads flags: the page's modules are served from here, unbundled.

import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { extname, join, normalize } from "node:path";
import { chromium } from "playwright-core";
import { serve, target } from "./lines.mjs";

const [executablePath, origin] = process.argv.slice(4);
const { hostname, port } = new URL(origin);
const folder = "/node_modules/@openfeature";
// The provider for web pages has a newer core of its own.
const imports = {
  "@openfeature/core": `${folder}/core/dist/esm/index.js`,
  "@openfeature/web-sdk": `${folder}/web-sdk/dist/esm/index.js`,
  "@openfeature/ofrep-core": `${folder}/ofrep-web-provider/node_modules/@openfeature/ofrep-core/index.esm.js`,
  "@openfeature/ofrep-web-provider": `${folder}/ofrep-web-provider/index.esm.js`,
};
const html = `<!doctype html><title>Flags</title>
<script type="importmap">${JSON.stringify({ imports })}</script>
<script type="module" src="/page.mjs"></script>`;

const pages = createServer(async (request, response) => {
  if (request.url === "/") {
    response.setHeader("content-type", "text/html").end(html);
    return;
  }
  const path = join(import.meta.dirname, normalize(request.url));
  const found = await readFile(path).catch(() => null);
  const isScript = [".js", ".mjs"].includes(extname(path));
  response.writeHead(found && isScript ? 200 : 404, { "content-type": "text/javascript" }).end(found ?? "");
});
await new Promise((listening) => pages.listen(Number(port), hostname, listening));

const quiet = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync", "--no-proxy-server",
];
const browser = await chromium.launch({ executablePath, args: quiet });
const page = await browser.newPage();
page.on("pageerror", (error) => console.error(`page: ${error.message}`));
page.on("console", (message) => console.error(`page: ${message.text()}`));
await page.goto(origin);
await page.waitForFunction(() => window.start !== undefined);
await page.evaluate((how) => window.start(how), target());
await serve((calls) => page.evaluate((calls) => window.read(calls), calls));
await browser.close();
process.exit(0);
