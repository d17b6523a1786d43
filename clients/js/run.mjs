// `node run.mjs OUTPUT`: make the calls of calls.mjs, and write JSON as `clients.run` does.
import { writeFileSync } from "node:fs";
import { calls, errors } from "./calls.mjs";

const TOLERANCE = 1e-5;

// Where `found` differs from `expected` first, and how; empty if it does not.
function difference(found, expected, place = "") {
  if (Array.isArray(expected) || ArrayBuffer.isView(expected)) {
    if (found?.length !== expected.length) return `${place} has ${found?.length} entries, expected ${expected.length}`;
    for (let i = 0; i < expected.length; i++) {
      const part = difference(found[i], expected[i], `${place}[${i}]`);
      if (part) return part;
    }
    return "";
  }
  const isNear = typeof expected === "number" && Math.abs(found - expected) <= TOLERANCE * Math.max(1, Math.abs(expected));
  return isNear || found === expected ? "" : `${place} is ${JSON.stringify(found)}, expected ${JSON.stringify(expected)}`;
}

// Why a call does not do as it should; empty if it does.
async function trouble({ run, equals, error, raises }) {
  try {
    const found = await run();
    return error ? `no error, expected ${error}` : difference(found, equals);
  } catch (caught) {
    const message = [caught.message, caught.body, caught.responseBody, caught.httpResponse?.body]
      .map((part) => (typeof part === "string" ? part : JSON.stringify(part) ?? ""))
      .join(" ");
    if (!error) return `${caught.name}: ${message}`.slice(0, 600);
    if (!message.includes(error)) return `the message is ${message.slice(0, 400)}, expected ${error}`;
    const kind = caught.constructor.name;
    return !raises || kind === raises ? "" : `${kind} is raised, expected ${raises}`;
  }
}

async function results(entries) {
  const made = [];
  for (const [name, call] of Object.entries(entries)) {
    const { fails = null, bad = null, raises = null, cause = null } = call;
    made.push({ name, trouble: (await trouble(call)) || null, fails, bad, raises, cause });
  }
  return made;
}

const rows = {};
for (const row of Object.keys(calls)) {
  rows[row] = { calls: await results(calls[row]), errors: await results(errors[row] ?? {}) };
}
writeFileSync(process.argv[2], JSON.stringify(rows, null, 1));
process.exit(0);
