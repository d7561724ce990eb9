// An actor outside Ray in JavaScript: joins a Millrace run of Pendulum-v1, acts by its policy and writes experience to it.
// As outside_actor.py beside it, which explains more; but this one speaks no TLS, and ends where its connection does.
//
//   package.json: {"type": "module", "dependencies": {"@grpc/grpc-js": "^1.14", "@grpc/proto-loader": "^0.8",
//                  "apache-arrow": "^21.2", "onnxruntime-node": "^1.30"}}
//   npm install && node outside_actor.mjs HOST:PORT PATH/TO/outside_token [PATH/TO/control.proto]

import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import * as arrow from "apache-arrow";
import * as ort from "onnxruntime-node";

const [address, tokenFile, proto = new URL("../control.proto", import.meta.url).pathname] = process.argv.slice(2);
const NAME = "pendulum-js", LANES = 4, LOW = -2, HIGH = 2, STEPS = 200;

// Arrow Flight is gRPC; this is as much of Flight.proto as DoPut needs.
const field = (type, id) => ({ type, id });
const nested = {
  FlightDescriptor: { fields: { type: field("int32", 1), cmd: field("bytes", 2) } },
  FlightData: { fields: {
    flightDescriptor: field("FlightDescriptor", 1), dataHeader: field("bytes", 2), appMetadata: field("bytes", 3),
    dataBody: field("bytes", 1000) } },
  PutResult: { fields: { appMetadata: field("bytes", 1) } },
  FlightService: { methods: { DoPut: {
    requestType: "FlightData", requestStream: true, responseType: "PutResult", responseStream: true } } },
};
const flight = grpc.loadPackageDefinition(
  loader.fromJSON({ nested: { arrow: { nested: { flight: { nested: { protocol: { nested } } } } } } }),
).arrow.flight.protocol;

class Pendulum {
  reset() { [this.angle, this.speed, this.steps] = [(2 * Math.random() - 1) * Math.PI, 2 * Math.random() - 1, 0]; }
  observation() { return [Math.cos(this.angle), Math.sin(this.angle), this.speed]; }
  step(action) { // returns the reward
    const torque = Math.max(LOW, Math.min(HIGH, action)), angle = Math.atan2(Math.sin(this.angle), Math.cos(this.angle));
    const reward = -(angle ** 2 + 0.1 * this.speed ** 2 + 0.001 * torque ** 2);
    this.speed = Math.max(-8, Math.min(8, this.speed + (15 * Math.sin(this.angle) + 3 * torque) * 0.05));
    [this.angle, this.steps] = [this.angle + this.speed * 0.05, this.steps + 1];
    return reward;
  }
}

// The control plane, and the policy that it has.
const bearer = (token) => grpc.Metadata.fromHttp2Headers({ authorization: `Bearer ${token}` });
const { millrace } = grpc.loadPackageDefinition(loader.loadSync(proto, { keepCase: true, longs: Number }));
const control = new millrace.Control(address, grpc.credentials.createInsecure());
const joinToken = bearer(readFileSync(tokenFile, "utf8").trim());
const call = (method, request) =>
  new Promise((done, fail) => control[method](request, joinToken, (error, reply) => (error ? fail(error) : done(reply))));

let policy = null; // { version, inputs, session }
async function fetchPolicies() {
  for (;; await sleep(2000)) {
    try {
      const parts = [];
      for await (const part of control.Policy({ name: NAME, have: policy?.version ?? -1 }, joinToken)) parts.push(part);
      if (!parts.length) continue;
      const { version, inputs } = parts[0].header;
      const graph = Buffer.concat(parts.slice(1).map((part) => part.onnx ?? Buffer.alloc(0)));
      policy = { version, inputs, session: await ort.InferenceSession.create(graph) };
    } catch (error) {
      console.log(`no newer policy: ${error.details ?? error}`);
    }
  }
}

const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());

async function act(observations) { // the actions for the environment, the same as rows hold them, and the version
  if (!policy) {
    const row = observations.map(() => 2 * Math.random() - 1);
    return [row.map((value) => LOW + ((value + 1) / 2) * (HIGH - LOW)), row, 0];
  }
  const { version, inputs, session } = policy, feeds = {};
  for (const { name, shape, holds } of inputs) { // of policies for continuous actions: observation or standard_normal
    const size = shape.reduce((a, b) => a * b, LANES);
    const values = holds === "observation" ? observations.flat() : Array.from({ length: size }, normal);
    feeds[name] = new ort.Tensor("float32", Float32Array.from(values), [LANES, ...shape]);
  }
  const { action, row_action } = await session.run(feeds);
  return [action.data, row_action.data, version];
}

// The shard: messages of rows, each answered before the next.
const joined = await call("Join", { name: NAME, lanes: LANES });
const task = JSON.parse(joined.task);
if (task.environment.id !== "Pendulum-v1" || task.chunk !== 1) throw new Error(`the run plays ${joined.task}`);
const headerOf = (bytes, at = 0) => bytes.subarray(at + 8, at + 8 + bytes.readInt32LE(at + 4)); // of an encapsulated message
const schema = arrow.tableFromIPC(joined.arrow_schema).schema;
const layout = JSON.parse(schema.metadata.get("millrace.layout")); // name: [type, shape, offset]
const shard = new flight.FlightService(joined.shard.replace("grpc://", ""), grpc.credentials.createInsecure());
const stream = shard.DoPut(bearer(joined.token)), answers = stream[Symbol.asyncIterator]();
async function answer() { // throws where a message was refused
  const { value, done } = await answers.next();
  if (done) throw new Error("the shard has ended the stream");
  if (value.appMetadata.length > 8) throw new Error(value.appMetadata.subarray(8).toString());
  return value.appMetadata.readBigInt64LE(0);
}
const cmd = Buffer.from(JSON.stringify({ writer: joined.writer }));
stream.write({ flightDescriptor: { type: 2, cmd }, dataHeader: headerOf(joined.arrow_schema) });
let number = await answer();
console.log(`joined as ${joined.writer}, writing to ${joined.shard}`);

function packed({ observation, action = 0, reward = 0, version, first = 0, last = 0 }) { // a row's bytes
  const row = Buffer.alloc(schema.fields[1].type.byteWidth), at = (name) => layout[name][2];
  observation.forEach((value, i) => row.writeFloatLE(value, at("observation") + 4 * i));
  for (const [name, value] of [["action", action], ["reward", reward]]) row.writeFloatLE(value, at(name));
  row.writeInt32LE(version, at("policy_version"));
  [row[at("is_first")], row[at("is_last")]] = [first, last];
  return row;
}

async function write(lanes, rows) {
  const column = (type, data) => arrow.makeData({ type, length: rows.length, data });
  const [lane, row] = schema.fields.map((one) => one.type);
  const children = [column(lane, Int32Array.from(lanes)), column(row, new Uint8Array(Buffer.concat(rows)))];
  const struct = arrow.makeData({ type: new arrow.Struct(schema.fields), length: rows.length, children });
  const ipc = Buffer.from(arrow.RecordBatchStreamWriter.writeAll([new arrow.RecordBatch(schema, struct)]).toUint8Array(true));
  const begin = 8 + ipc.readInt32LE(4); // behind the schema lies the batch: its header, its body, and 8 bytes of end
  const dataHeader = headerOf(ipc, begin), dataBody = ipc.subarray(begin + 8 + dataHeader.length, -8);
  const appMetadata = Buffer.alloc(8);
  appMetadata.writeBigInt64LE((number += 1n));
  stream.write({ dataHeader, dataBody, appMetadata });
  await answer();
}

const envs = Array.from({ length: LANES }, () => new Pendulum());
let playing = true, first = 1;
const leave = () => call("Leave", { name: NAME }).finally(() => process.exit(0));
for (const name of ["SIGINT", "SIGTERM"]) process.on(name, () => setTimeout(leave, 2000, (playing = false)));
envs.forEach((env) => env.reset());
fetchPolicies();
while (playing) {
  const observations = envs.map((env) => env.observation()), lanes = [...envs.keys()];
  const [actions, row, version] = await act(observations);
  const rewards = envs.map((env, i) => env.step(actions[i]));
  const rows = observations.map((observation, i) => packed({ observation, action: row[i], reward: rewards[i], version, first }));
  first = Number(envs[0].steps === STEPS);
  if (first) { // all at once: the last observations, then new episodes
    lanes.push(...envs.keys());
    rows.push(...envs.map((env) => packed({ observation: env.observation(), version, last: 1 })));
    envs.forEach((env) => env.reset());
  }
  await write(lanes, rows);
}
stream.write({ appMetadata: Buffer.from("close") });
stream.end();
await leave();
