// Calls of the clients in JavaScript, by the rows of the table: what is run, and what must come of it.
import { readFileSync } from "node:fs";
import { createCohere } from "@ai-sdk/cohere";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { InferenceClient } from "@huggingface/inference";
import { CohereEmbeddings, CohereRerank } from "@langchain/cohere";
import { OpenAIEmbeddings } from "@langchain/openai";
import { embed, embedMany, rerank } from "ai";
import { CohereClient, CohereClientV2 } from "cohere-ai";
import { Ollama } from "ollama";
import OpenAI from "openai";
import { VoyageAIClient } from "voyageai";

const V = JSON.parse(readFileSync(process.env.CENOTE_CLIENT_VALUES));
const { a: A, b: B, c: C, texts, question } = V;
const WITHOUT = "The model `none` does not exist";

const openai = new OpenAI({ apiKey: "none", baseURL: `${A}/v1` });
const vectors = async (answer) => (await answer).data.map((entry) => entry.embedding);

const cohere = new CohereClientV2({ token: "none", environment: A });
const cohereV1 = new CohereClient({ token: "none", environment: A });
const ranks = async (answer) => (await answer).results.map((result) => [result.index, result.relevanceScore]);

const voyage = new VoyageAIClient({ apiKey: "none", environment: `${A}/v1` });
const voyageRanks = async (answer) => (await answer).data.map((entry) => [entry.index, entry.relevanceScore]);

const hub = new InferenceClient("none");
const endpoint = (model) => hub.endpoint(`${A}/models/${model}`);
const classes = async (answer) => (await answer).map(({ label, score }) => [label, score]);
const NO_MASK = "fill-mask is no task of a pooling model";
const NO_ZERO = "zero-shot classification by NLI is not served";

const langchain = new OpenAIEmbeddings({ model: "minilm", apiKey: "none", configuration: { baseURL: `${A}/v1` } });
const compatible = createOpenAICompatible({ name: "cenote", baseURL: `${A}/v1` });
const sdkCohere = createCohere({ apiKey: "none", baseURL: `${A}/v2` });
const langchainCohere = { client: cohere, model: "minilm" };
const document = (pageContent) => ({ pageContent, metadata: {} });

export const calls = {
  openai: {
    "embeddings.create": {
      run: () => vectors(openai.embeddings.create({ model: "minilm", input: texts })),
      equals: V.vectors,
    },
    "embeddings.create: float": {
      run: () => vectors(openai.embeddings.create({ model: "minilm", input: texts, encoding_format: "float" })),
      equals: V.vectors,
    },
    "models.retrieve": { run: async () => (await openai.models.retrieve("cross")).id, equals: "cross" },
    "error: model": { run: () => openai.embeddings.create({ model: "none", input: "a" }), error: WITHOUT },
  },
  "cohere-ai": {
    "v2 embed": {
      run: async () =>
        (await cohere.embed({ model: "minilm", inputType: "search_document", texts, embeddingTypes: ["float"] })).embeddings
          .float,
      equals: V.vectors,
    },
    "v2 rerank": { run: () => ranks(cohere.rerank({ model: "cross", query: question, documents: texts })), equals: V.ranked },
    "v1 embed": {
      run: async () => (await cohereV1.embed({ model: "minilm", inputType: "search_query", texts })).embeddings,
      equals: V.vectors,
    },
    "v1 rerank, error: model": {
      run: () => cohereV1.rerank({ model: "none", query: question, documents: texts }),
      error: WITHOUT,
    },
  },
  voyageai: {
    embed: { run: () => vectors(voyage.embed({ model: "minilm", input: texts })), equals: V.vectors },
    "embed: input type": {
      run: () => vectors(voyage.embed({ model: "minilm", input: texts, inputType: "document" })),
      equals: V.vectors,
    },
    rerank: {
      run: () => voyageRanks(voyage.rerank({ model: "cross", query: question, documents: texts })),
      equals: V.ranked,
      cause: "answers-of-several-vendors",
    },
    "rerank: topK": {
      run: () => voyageRanks(voyage.rerank({ model: "cross", query: question, documents: texts, topK: 2 })),
      equals: V.ranked.slice(0, 2),
    },
    "error: model": { run: () => voyage.embed({ model: "none", input: texts }), error: WITHOUT },
  },
  "@huggingface/inference": {
    featureExtraction: {
      cause: "url-per-model",
      run: () => endpoint("minilm").featureExtraction({ inputs: texts }),
      equals: V.vectors,
    },
    sentenceSimilarity: {
      run: () =>
        endpoint("minilm").sentenceSimilarity({ inputs: { source_sentence: question, sentences: texts } }),
      equals: V.similarities,
    },
    textClassification: {
      run: () => classes(endpoint("classes").textClassification({ inputs: V.text })),
      equals: V.classes[0],
    },
    tokenClassification: {
      run: async () =>
        (await endpoint("entities").tokenClassification({ inputs: V.named })).map((e) => [
          e.entity_group, e.word, e.start, e.end, e.score,
        ]),
      equals: V.entities,
    },
    "textClassification: error, too long": {
      run: () => endpoint("minilm").textClassification({ inputs: V.long, parameters: { truncate: false } }),
      error: "maximum context length is 256 tokens",
    },
    fillMask: { run: () => endpoint("minilm").fillMask({ inputs: "a [MASK]" }), fails: NO_MASK },
    zeroShotClassification: {
      run: () =>
        endpoint("classes").zeroShotClassification({ inputs: [V.text], parameters: { candidate_labels: ["a", "b"] } }),
      fails: NO_ZERO,
    },
  },
  "@langchain/openai, ai": {
    embedDocuments: { run: () => langchain.embedDocuments(texts), equals: V.vectors },
    embedQuery: { run: () => langchain.embedQuery(V.text), equals: V.vectors[0] },
    embedMany: {
      run: async () => (await embedMany({ model: compatible.textEmbeddingModel("minilm"), values: texts })).embeddings,
      equals: V.vectors,
    },
  },
  "@langchain/cohere, @ai-sdk/cohere": {
    "CohereEmbeddings.embedDocuments": {
      run: () => new CohereEmbeddings(langchainCohere).embedDocuments(texts),
      equals: V.vectors,
    },
    "CohereRerank.compressDocuments": {
      run: async () =>
        (
          await new CohereRerank({ client: cohere, model: "cross", topN: 3 }).compressDocuments(texts.map(document), question)
        ).map((found) => [texts.indexOf(found.pageContent), found.metadata.relevanceScore]),
      equals: V.ranked,
    },
    embed: {
      cause: "vendors-input-types",
      run: async () => (await embed({ model: sdkCohere.textEmbeddingModel("minilm"), value: V.text })).embedding,
      equals: V.vectors[0],
    },
    rerank: {
      run: async () =>
        (await rerank({ model: sdkCohere.reranking("cross"), query: question, documents: texts })).ranking.map((entry) => [
          entry.originalIndex, entry.score,
        ]),
      equals: V.ranked,
    },
  },
  ollama: {
    embed: {
      run: async () => (await new Ollama({ host: A }).embed({ model: "minilm", input: texts })).embeddings,
      equals: V.vectors,
    },
  },
};

// Bad requests: each by what is bad about it, with the server's message and the client's own exception.
const SAYS = {
  missing: "Field required",
  type: "validation error",
  model: WITHOUT,
  long: "maximum context length is",
  key: "missing or wrong API key",
  full: "16384 sequences wait already",
  large: "at most 2000 are allowed",
};
const STATUS = { missing: 400, type: 400, model: 404, long: 400, key: 401, full: 429, large: 413 };
const EXACTLY = { missing: "Exactly one of `input` and `messages` must be given" };
const BIG = "deep ".repeat(500);

// `send(url, key, fields)` makes a right request whose input is `field`; `fields` replace those that it has.
function refusals(send, field, raises, { says = {}, without = [], inputs = {}, of = "" } = {}) {
  const input = (value) => ({ [field]: value });
  const requests = {
    missing: () => send(A, "none", input(null)),
    type: () => send(A, "none", input(inputs.type ?? [1.5])),
    model: () => send(A, "none", { model: "none" }),
    long: () => send(A, "none", input(inputs.long ?? V.long)),
    key: () => send(B, "wrong", {}),
    full: () => send(C, "none", {}),
    large: () => send(C, "none", input(inputs.large ?? BIG)),
  };
  const kind = (bad) => (typeof raises === "string" ? raises : raises[STATUS[bad]]);
  const call = ([bad, run]) => [
    of ? `${of}: ${bad}` : bad,
    { run, error: says[bad] ?? SAYS[bad], raises: kind(bad), bad, cause: "readable-errors" },
  ];
  return Object.fromEntries(Object.entries(requests).filter(([bad]) => !without.includes(bad)).map(call));
}

const once = { maxRetries: 0 };
const OPENAI = { 400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 413: "APIError", 429: "RateLimitError" };
const COHERE = { 400: "BadRequestError", 401: "UnauthorizedError", 404: "NotFoundError", 413: "CohereError", 429: "TooManyRequestsError" };
const modelAt = (url) => (url === A ? "cross" : "minilm");

const openaiAt = (url, apiKey, fields) =>
  new OpenAI({ apiKey, baseURL: `${url}/v1`, ...once }).embeddings.create({ model: "minilm", input: "a", ...fields });
const cohereAt = (url, token, fields) =>
  new CohereClientV2({ token, environment: url }).embed(
    { model: "minilm", inputType: "search_document", texts, embeddingTypes: ["float"], truncate: "NONE", ...fields },
    once,
  );
const cohereRerankAt = (url, token, fields) =>
  new CohereClientV2({ token, environment: url }).rerank({ model: modelAt(url), query: question, documents: texts, ...fields }, once);
const voyageAt = (url, apiKey, fields) =>
  new VoyageAIClient({ apiKey, environment: `${url}/v1` }).embed({ model: "minilm", input: texts, truncation: false, ...fields }, once);
const voyageRerankAt = (url, apiKey, fields) =>
  new VoyageAIClient({ apiKey, environment: `${url}/v1` }).rerank(
    { model: modelAt(url), query: question, documents: texts, truncation: false, ...fields },
    once,
  );
const hubAt = (url, token, { model = "minilm", ...fields }) =>
  new InferenceClient(token)
    .endpoint(url === A ? `${url}/models/${model}` : url)
    .featureExtraction({ inputs: "a", truncate: false, ...fields });
const langchainAt = (url, apiKey, { model = "minilm", text = "a" }) =>
  new OpenAIEmbeddings({ model, apiKey, ...once, configuration: { baseURL: `${url}/v1` } }).embedDocuments([text]);
const manyAt = (url, apiKey, { model = "minilm", value = "a" }) =>
  embedMany({
    model: createOpenAICompatible({ name: "cenote", baseURL: `${url}/v1`, apiKey }).textEmbeddingModel(model),
    values: [value],
    ...once,
  });
const sdkAt = (url, apiKey, { model = modelAt(url), documents = texts }) =>
  rerank({ query: question, documents, model: createCohere({ apiKey, baseURL: `${url}/v2` }).reranking(model), ...once });
const sdkEmbedAt = (url, apiKey, { model = "minilm", value = "a" }) =>
  embed({ value, model: createCohere({ apiKey, baseURL: `${url}/v2` }).textEmbeddingModel(model), ...once });
const langchainCohereAt = (url, token, { model = modelAt(url), documents = texts }) =>
  new CohereRerank({ client: new CohereClientV2({ token, environment: url, ...once }), model }).rerank(documents, question);
const ollamaAt = (url, key, fields) =>
  new Ollama({ host: url, headers: { Authorization: `Bearer ${key}` } }).embed({ model: "minilm", input: "a", truncate: false, ...fields });

// What the client refuses by itself, or what is always cut.
const OWN = ["missing", "type"];
const OWN_RERANK = { of: "rerank", without: [...OWN, "long"], inputs: { large: [BIG] } };
const LISTED = { inputs: { long: [V.long], large: [BIG] } };

export const errors = {
  openai: refusals(openaiAt, "input", OPENAI, { says: EXACTLY }),
  "cohere-ai": {
    ...refusals(cohereAt, "texts", COHERE, { ...LISTED, says: { missing: "Exactly one of texts, images, or inputs" }, without: ["type"] }),
    ...refusals(cohereRerankAt, "documents", COHERE, OWN_RERANK),
  },
  voyageai: {
    ...refusals(voyageAt, "input", "VoyageAIError", { without: OWN }),
    ...refusals(voyageRerankAt, "documents", "VoyageAIError", { ...LISTED, of: "rerank", without: OWN }),
  },
  "@huggingface/inference": refusals(hubAt, "inputs", "InferenceClientProviderApiError"),
  "@langchain/openai, ai": {
    ...refusals(langchainAt, "text", { ...OPENAI, 400: "ContextOverflowError" }, { of: "embedDocuments", without: OWN }),
    ...refusals(manyAt, "value", "APICallError", { of: "embedMany", says: { missing: SAYS.type } }),
  },
  "@langchain/cohere, @ai-sdk/cohere": {
    ...refusals(sdkAt, "documents", "APICallError", OWN_RERANK),
    ...refusals(sdkEmbedAt, "value", "APICallError", { of: "embed", says: { missing: SAYS.type }, without: ["long"] }),
    ...refusals(langchainCohereAt, "documents", COHERE, { ...OWN_RERANK, of: "CohereRerank.rerank" }),
  },
  ollama: refusals(ollamaAt, "input", "ResponseError"),
};
