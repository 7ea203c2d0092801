// Holds one ONNX file for onnx_process.py, which describes the frames: node runner.mjs PACKAGE
// FOLDER loads PACKAGE from FOLDER/node_modules.

import { existsSync, readSync, writeSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, join } from "node:path";

const ARRAYS = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array };
const FATAL = 4; // severity above which ONNX Runtime logs; errors arrive as exceptions anyway

console.log = console.info = console.error; // stdout is for frames

const [name, folder] = process.argv.slice(2);
let ort, session;

/** The next bytes of stdin in an ArrayBuffer; ends the process with its reader. */
function read(count) {
  const bytes = new Uint8Array(count);
  for (let done = 0; done < count; ) {
    const got = readSync(0, bytes, done, count - done);
    if (got === 0) process.exit(0);
    done += got;
  }
  return bytes.buffer;
}

function write(bytes) {
  for (let done = 0; done < bytes.length; ) done += writeSync(1, bytes, done);
}

function reply(header, payload = []) {
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(4);
  length.writeUInt32LE(text.length);
  for (const part of [length, text, ...payload]) write(part);
}

/** Run what replies, or reply why it could not. */
async function answer(work) {
  try {
    await work();
  } catch (error) {
    reply({ error: String(error?.message ?? error) });
  }
}

function load() {
  ort = createRequire(join(folder, "package.json"))(name);
  if (name === "onnxruntime-web") ort.env.wasm.numThreads = 1;
  reply({});
}

async function open(path) {
  const options = { logSeverityLevel: FATAL };
  if (name === "onnxruntime-web") {
    options.executionProviders = ["wasm"];
    const data = `${path}.data`; // a page has no folder to look into: it names such files itself
    if (existsSync(data)) options.externalData = [{ path: basename(data), data }];
  }
  session = await ort.InferenceSession.create(path, options);
  reply({});
}

async function run(tensors) {
  const inputs = {};
  // all are read before anything can fail, or the rest would be taken for a frame
  const buffers = tensors.map((tensor) => read(tensor.bytes));
  await answer(async () => {
    tensors.forEach(({ name, type, shape }, i) => {
      inputs[name] = new ort.Tensor(type, new ARRAYS[type](buffers[i]), shape);
    });
    const results = await session.run(inputs);
    const outputs = session.outputNames.map((output) => results[output]);
    const payload = outputs.map(({ data }) =>
      Buffer.from(data.buffer, data.byteOffset, data.byteLength),
    );
    reply(
      {
        outputs: outputs.map(({ type, dims }, i) => ({
          name: session.outputNames[i],
          type,
          shape: dims,
          bytes: payload[i].length,
        })),
      },
      payload,
    );
  });
}

await answer(load);
for (;;) {
  const length = new DataView(read(4)).getUint32(0, true);
  const request = JSON.parse(Buffer.from(read(length)).toString());
  if (request.open !== undefined) await answer(() => open(request.open));
  else await run(request.run);
}
