// Anthropic's JavaScript client, unchanged, against a running gateway: ANTHROPIC_BASE_URL, ANTHROPIC_API_KEY, MODEL.
import assert from 'node:assert/strict';
import Anthropic from '@anthropic-ai/sdk';

const model = process.env.MODEL;
const messages = [{ role: 'user', content: 'Name three colours.' }];
const client = new Anthropic({ maxRetries: 0 });

const checks = {
  async message() {
    const answer = await client.messages.create({ model, messages, max_tokens: 8, system: 'Be brief.' });
    assert.equal(answer.role, 'assistant');
    assert.equal(answer.content[0].type, 'text');
    assert(['end_turn', 'max_tokens'].includes(answer.stop_reason));
    assert(answer.weir.nodes.length > 0);
    assert(answer._request_id.startsWith('req_'));
  },

  async streamed() {
    const common = { model, messages, max_tokens: 8, seed: 1 };
    const whole = await client.messages.create(common);
    const stream = client.messages.stream(common);
    let text = '';
    stream.on('text', (delta) => { text += delta; });
    const answer = await stream.finalMessage();
    assert.equal(text, whole.content[0].text);
    assert.equal(answer.content[0].text, text);
    assert.equal(answer.stop_reason, whole.stop_reason);
    assert.equal(answer.usage.output_tokens, whole.usage.output_tokens);
  },

  async countTokens() {
    assert((await client.messages.countTokens({ model, messages })).input_tokens > 0);
  },

  async errors() {
    const refused = (promise, status, type) =>
      assert.rejects(promise, (error) => error instanceof Anthropic.APIError && error.status === status && error.error.error.type === type);
    const common = { messages, max_tokens: 4 };
    await refused(client.messages.create({ ...common, model: 'no-such' }), 404, 'not_found_error');
    await refused(client.messages.create({ ...common, model, temperature: 9 }), 400, 'invalid_request_error');
    const stranger = new Anthropic({ apiKey: 'wrong', maxRetries: 0 });
    await refused(stranger.messages.create({ ...common, model }), 401, 'authentication_error');
  },

  async leavingEarly() {
    const stream = await client.messages.create({ model, messages, max_tokens: 500, stream: true });
    for await (const _ of stream) break;
    await checks.message();
  },
};

for (const [name, check] of Object.entries(checks)) {
  const began = performance.now();
  await check();
  console.log(`${name}: ok, ${((performance.now() - began) / 1000).toFixed(2)} s`);
}
