// A request as curl, Python and TypeScript. The key is in none of them: each reads it from a variable.
import { curlOf } from "./api.js";
import { ROOT } from "./router.js";

export const LANGUAGES = [["curl", "curl"], ["python", "Python"], ["typescript", "TypeScript"]];

export function requestIn(language, request) {
  return { curl, python, typescript }[language](request);
}

const base = () => `${location.origin}${ROOT}/v1`;

const curl = (request) => curlOf("/v1/chat/completions", request);

const python = (request) => `import os
from openai import OpenAI

client = OpenAI(base_url="${base()}", api_key=os.environ["LUCID_API_KEY"])
answer = client.chat.completions.create(
${Object.entries(request).map(([name, value]) => `    ${name}=${literal(value)},`).join("\n")}
)
print(answer.choices[0].message.content)`;

const typescript = (request) => `import OpenAI from "openai";

const client = new OpenAI({ baseURL: "${base()}", apiKey: process.env.LUCID_API_KEY });
const answer = await client.chat.completions.create(${JSON.stringify(request, null, 2)});
console.log(answer.choices[0].message.content);`;

// JSON of texts, numbers, lists and objects is Python as well.
const literal = (value) => JSON.stringify(value);
