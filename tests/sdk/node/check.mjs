// The official JavaScript client, unchanged, against a running gateway: OPENAI_BASE_URL, OPENAI_API_KEY, MODEL.
import assert from 'node:assert/strict';
import OpenAI from 'openai';
import { zodFunction, zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const model = process.env.MODEL;
const messages = [{ role: 'user', content: 'Name three colours.' }];
const client = new OpenAI({ maxRetries: 0 });

const Forecast = z.object({
  town: z.string().max(12),
  days: z.number().int().min(1).max(14),
  unit: z.enum(['C', 'F']),
});

const checks = {
  async models() {
    const ids = [];
    for await (const entry of client.models.list()) ids.push(entry.id);
    assert(ids.includes(model));
    assert.equal((await client.models.retrieve(model)).id, model);
  },

  async chat() {
    const answer = await client.chat.completions.create({ model, messages, max_tokens: 8 });
    assert.equal(answer.choices[0].message.role, 'assistant');
    assert(['stop', 'length'].includes(answer.choices[0].finish_reason));
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
    assert(answer.weir.nodes.length > 0);
    assert(answer._request_id.startsWith('req_'));
  },

  async streamed() {
    const common = { model, messages, max_tokens: 8, seed: 1 };
    const whole = await client.chat.completions.create(common);
    const stream = await client.chat.completions.create({
      ...common, stream: true, stream_options: { include_usage: true },
    });
    let text = '';
    let usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? '';
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  },

  async streamHelper() {
    const stream = client.chat.completions.stream({ model, messages, max_tokens: 8, n: 2, logprobs: true });
    const answer = await stream.finalChatCompletion();
    assert.equal(answer.choices.length, 2);
    assert(answer.choices.every((choice) => choice.logprobs.content.length > 0));
  },

  async completions() {
    const whole = await client.completions.create({ model, prompt: 'One', max_tokens: 4, seed: 3 });
    const stream = await client.completions.create({ model, prompt: 'One', max_tokens: 4, seed: 3, stream: true });
    let text = '';
    for await (const chunk of stream) text += chunk.choices[0]?.text ?? '';
    assert.equal(text, whole.choices[0].text);
  },

  async responses() {
    const common = { model, input: 'Name three colours.', max_output_tokens: 8, seed: 1 };
    const whole = await client.responses.create(common);
    assert(['completed', 'incomplete'].includes(whole.status) && whole.output_text.length > 0);
    const stream = client.responses.stream(common);
    let text = '';
    stream.on('response.output_text.delta', (event) => { text += event.delta; });
    const answer = await stream.finalResponse();
    assert.equal(text, whole.output_text);
    assert.equal(answer.output[0].content[0].text, text);
    assert.equal(answer.usage.output_tokens, whole.usage.output_tokens);
    const on = await client.responses.create({ ...common, input: 'More?', previous_response_id: whole.id });
    assert(on.usage.input_tokens > whole.usage.input_tokens);
  },

  async errors() {
    const refused = (promise, status, code) =>
      assert.rejects(promise, (error) => error instanceof OpenAI.APIError && error.status === status && error.code === code);
    await refused(client.chat.completions.create({ model: 'no-such', messages }), 404, 'model_not_found');
    await refused(client.chat.completions.create({ model, messages: [] }), 400, 'empty_array');
    await refused(client.completions.create({ model, prompt: 'x', n: 0 }), 400, 'integer_below_min_value');
    await refused(new OpenAI({ apiKey: 'wrong', maxRetries: 0 }).models.list(), 401, 'invalid_api_key');
  },

  async structured() {
    const common = { model, messages, max_tokens: 300, seed: 4, response_format: zodResponseFormat(Forecast, 'forecast') };
    const whole = await client.chat.completions.parse(common);
    Forecast.parse(whole.choices[0].message.parsed);
    const streamed = await client.chat.completions.stream(common).finalChatCompletion();
    assert.deepEqual(streamed.choices[0].message.parsed, whole.choices[0].message.parsed);
  },

  async tools() {
    const forecast = zodFunction({ name: 'forecast', parameters: Forecast });
    const common = { model, messages, max_tokens: 400, seed: 5, tools: [forecast], parallel_tool_calls: false };
    const stream = client.chat.completions.stream({ ...common, tool_choice: 'required' });
    let deltas = 0;
    stream.on('tool_calls.function.arguments.delta', () => (deltas += 1));
    const answer = await stream.finalChatCompletion();
    assert.equal(answer.choices[0].finish_reason, 'tool_calls');
    const [call] = answer.choices[0].message.tool_calls;
    assert(deltas > 1 && call.function.name === 'forecast');
    Forecast.parse(JSON.parse(call.function.arguments));
    const after = await client.chat.completions.create({
      ...common,
      max_tokens: 8,
      messages: [...messages, answer.choices[0].message, { role: 'tool', tool_call_id: call.id, content: '21 C' }],
    });
    assert(after.usage.prompt_tokens > answer.usage?.prompt_tokens || !answer.usage);
  },

  async leavingEarly() {
    const stream = await client.chat.completions.create({ model, messages, max_tokens: 500, stream: true });
    for await (const _ of stream) break;
    await checks.chat();
  },
};

for (const [name, check] of Object.entries(checks)) {
  const began = performance.now();
  await check();
  console.log(`${name}: ok, ${((performance.now() - began) / 1000).toFixed(2)} s`);
}
