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
const { a: A, b: B, c: C, key: KEY, texts, question } = V;
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
    },
    "rerank: topK": {
      run: () => voyageRanks(voyage.rerank({ model: "cross", query: question, documents: texts, topK: 2 })),
      equals: V.ranked.slice(0, 2),
    },
    "error: model": { run: () => voyage.embed({ model: "none", input: texts }), error: WITHOUT },
  },
  "@huggingface/inference": {
    featureExtraction: {
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

// Messages of ours that reach the user: of clients with none among the calls, and of overload and wrong keys.
const FULL = "16384 sequences wait already";
const WRONG_KEY = "missing or wrong API key";
const once = { maxRetries: 0 };
const openaiAt = (url, apiKey) => new OpenAI({ apiKey, baseURL: `${url}/v1`, ...once }).embeddings.create({ model: "minilm", input: "a" });
const cohereAt = (url, token) =>
  new CohereClientV2({ token, environment: url }).rerank({ model: "minilm", query: question, documents: texts }, once);
const voyageAt = (url, apiKey) =>
  new VoyageAIClient({ apiKey, environment: `${url}/v1` }).embed({ model: "minilm", input: texts }, once);
const hubAt = (url, token) => new InferenceClient(token).endpoint(url).featureExtraction({ inputs: "a" });
const sdkAt = (baseURL, apiKey) =>
  rerank({ query: question, documents: texts, model: createCohere({ apiKey, baseURL: `${baseURL}/v2` }).reranking("minilm"), ...once });
const refusals = (at) => ({
  overload: { run: () => at(C, "none"), error: FULL },
  key: { run: () => at(B, "wrong"), error: WRONG_KEY },
});
const missing = { model: "none", query: question, documents: texts };
export const errors = {
  openai: refusals(openaiAt),
  "cohere-ai": refusals(cohereAt),
  voyageai: refusals(voyageAt),
  "@huggingface/inference": refusals(hubAt),
  "@langchain/openai, ai": {
    embedQuery: { run: () => new OpenAIEmbeddings({ model: "none", apiKey: "none", maxRetries: 0, configuration: { baseURL: `${A}/v1` } }).embedQuery("a"), error: WITHOUT },
    embedMany: {
      run: () => embedMany({ model: compatible.textEmbeddingModel("none"), values: ["a"], maxRetries: 0 }),
      error: WITHOUT,
    },
  },
  "@langchain/cohere, @ai-sdk/cohere": {
    "CohereRerank.rerank": {
      run: () => new CohereRerank({ client: cohere, model: "none" }).rerank(texts, question),
      error: WITHOUT,
    },
    rerank: { run: () => rerank({ ...missing, model: sdkCohere.reranking("none"), maxRetries: 0 }), error: WITHOUT },
    ...refusals(sdkAt),
  },
  ollama: {
    embed: { run: () => new Ollama({ host: A }).embed({ model: "none", input: "a" }), error: WITHOUT },
    overload: { run: () => new Ollama({ host: C }).embed({ model: "minilm", input: "a" }), error: FULL },
  },
};
