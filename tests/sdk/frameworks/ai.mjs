// Vercel's AI SDK over a running gateway, by OpenAI's API and by Anthropic's: OPENAI_BASE_URL, OPENAI_API_KEY, MODEL.
import assert from 'node:assert/strict';
import { createAnthropic } from '@ai-sdk/anthropic';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateObject, generateText, stepCountIs, streamText, tool } from 'ai';
import { z } from 'zod';

const { OPENAI_BASE_URL: baseURL, OPENAI_API_KEY: apiKey, MODEL } = process.env;
const models = {
  openai: createOpenAICompatible({ name: 'weir', baseURL, apiKey, supportsStructuredOutputs: true, includeUsage: true })(MODEL),
  anthropic: createAnthropic({ baseURL, apiKey })(MODEL),
};
const asked = { system: 'Be brief.', prompt: 'Name three colours.', maxOutputTokens: 12, maxRetries: 0, temperature: 0 };

const checks = {
  async text(model) {
    const whole = await generateText({ model, ...asked });
    assert(whole.text.length > 0 && whole.usage.outputTokens <= 12);
    const stream = streamText({ model, ...asked, onError: ({ error }) => { throw error; } });
    let text = '';
    for await (const piece of stream.textStream) text += piece;
    assert.equal(text, whole.text);
    assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
  },

  async object(model) {
    const schema = z.object({ town: z.string().max(12), days: z.number().int().min(1).max(14) });
    const { object } = await generateObject({ model, schema, prompt: 'The weather in Ulm?', maxOutputTokens: 300, maxRetries: 0 });
    schema.parse(object);
  },

  async tools(model) {
    const called = [];
    const forecast = tool({
      description: 'What the weather will be in a town.',
      inputSchema: z.object({ town: z.string().max(12), days: z.number().int().min(1).max(14) }),
      execute: async (input) => { called.push(input); return `${input.days} days of rain`; },
    });
    const answer = await generateText({
      model, prompt: 'The weather in Ulm?', tools: { forecast }, toolChoice: 'required', maxOutputTokens: 300, maxRetries: 0,
      stopWhen: stepCountIs(1),
      // a small model goes on calling
      providerOptions: { weir: { parallel_tool_calls: false }, anthropic: { disableParallelToolUse: true } },
    });
    assert(called.length === 1 && answer.finishReason === 'tool-calls', JSON.stringify(answer.content));
    const on = await generateText({
      model, messages: [{ role: 'user', content: 'The weather in Ulm?' }, ...answer.response.messages], maxOutputTokens: 8,
      tools: { forecast }, toolChoice: 'none', maxRetries: 0,
    });
    assert(on.usage.outputTokens <= 8);
  },
};

for (const [api, model] of Object.entries(models)) {
  for (const [name, check] of Object.entries(checks)) {
    const began = performance.now();
    await check(model);
    console.log(`${api} ${name}: ok, ${((performance.now() - began) / 1000).toFixed(2)} s`);
  }
}
