// A client that has nothing of Grokmesh but its .proto files, or not even those: node client.mjs ADDRESS PROTO_FOLDER
import assert from "node:assert/strict";
import path from "node:path";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import reflection from "grpc-js-reflection-client";

const [address, protos] = process.argv.slice(2);
const credentials = grpc.credentials.createInsecure();
const completion = { text: "And it came to pass", max_tokens: 12, sampling: { seed: 5 } };

async function exercise(GenerationService) {
  const client = new GenerationService(address, credentials);
  const whole = await new Promise((resolve, reject) =>
    client.GenerateOnce({ completion }, (error, answer) => (error ? reject(error) : resolve(answer))));
  let text = "", tokens = 0;
  for await (const part of client.Generate({ completion })) {
    text += part.text;
    tokens += part.tokens.length;
  }
  assert.equal(text, whole.text);
  assert.equal(tokens, 12);
  const refused = await new Promise(resolve => client.GenerateOnce({ completion: {} }, resolve));
  assert.equal(refused.code, grpc.status.INVALID_ARGUMENT);
  assert.match(refused.details, /prompt: is missing/);
  client.close();
  return whole.text;
}

const options = { includeDirs: [protos], keepCase: true, defaults: true };
const known = loader.loadSync(path.join("grok", "serving", "v1", "generation.proto"), options);
const byFile = await exercise(grpc.loadPackageDefinition(known).grok.serving.v1.GenerationService);
const service = "grok.serving.v1.GenerationService";
const found = await new reflection.GrpcReflection(address, credentials, {}, "v1alpha").getDescriptorBySymbol(service);
const byReflection = await exercise(found.getPackageObject(options).grok.serving.v1.GenerationService);
assert.equal(byFile, byReflection);
console.log("the same by .proto files and by reflection");
process.exit(0);
