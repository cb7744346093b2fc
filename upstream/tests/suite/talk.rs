//! When all goes well.
use super::mock::{Mock, Script, chunk};
use super::{ask, fields, read, upstream};
use serde_json::json;
use weir_upstream::{Cost, Finish, Found, Queue, Usage};

#[tokio::test]
async fn an_answer_comes_with_what_it_cost_over_one_connection() {
    let mock = Mock::start(vec![Script::chat(&["It ", "scatters", "."])]);
    let upstream = upstream(&mock, "");
    upstream.warm().await.unwrap();
    for _ in 0..3 {
        let fields = fields();
        let (text, end) = read(upstream.ask(&ask(&fields, "")).await.unwrap()).await;
        let end = end.unwrap();
        assert_eq!((text.as_str(), end.finish), ("It scatters.", Finish::Stop));
        assert_eq!(end.usage, Usage { prompt_tokens: 10, output_tokens: 3, ..Usage::default() });
        assert_eq!(end.cost, Cost { nano_usd: 10 * 1000 + 3 * 2000, estimated: false });
    }
    assert_eq!(mock.connections(), 1, "the connection that was warm is used again and again");
    let seen = mock.seen();
    assert_eq!((seen.len(), seen[0].path.as_str()), (3, "/v1/chat/completions"));
    assert_eq!(seen[0].headers["authorization"], "Bearer sk-secret-123");
    assert_eq!((&seen[0].body["model"], &seen[0].body["max_tokens"]), (&json!("m"), &json!(100)));
}

#[tokio::test]
async fn a_dropped_answer_is_cancelled() {
    let mock = Mock::start(vec![Script::chat(&["a"; 50]).slow(std::time::Duration::from_millis(20))]);
    let fields = fields();
    let mut answer = upstream(&mock, "").ask(&ask(&fields, "")).await.unwrap();
    answer.next().await.unwrap().unwrap();
    drop(answer);
    for _ in 0..100 {
        if mock.left() == 1 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("the provider still writes");
}

#[tokio::test]
async fn tools_and_what_is_unknown_pass_through() {
    let call = |call: serde_json::Value| chunk(&json!({ "tool_calls": [call] }), None);
    let events = [
        chunk(&json!({ "role": "assistant", "content": null, "reasoning_content": "hm" }), None),
        call(
            json!({ "index": 0, "id": "c", "type": "function", "function": { "name": "f", "arguments": "{" } }),
        ),
        call(json!({ "index": 0, "function": { "arguments": "}" } })),
        chunk(&json!({}), Some("tool_calls")),
    ];
    let mock = Mock::start(vec![Script::events(&events)]);
    let mut fields = fields();
    fields.insert("tools".into(), json!([{ "type": "function", "function": { "name": "f" } }]));
    fields.insert("response_format".into(), json!({ "type": "json_schema", "json_schema": {} }));
    fields.insert("novelty".into(), json!({ "x": 1 }));
    let mut answer = upstream(&mock, "").ask(&ask(&fields, "")).await.unwrap();
    let mut rest = Vec::new();
    while let Some(piece) = answer.next().await.unwrap() {
        rest.push(piece.rest);
    }
    assert_eq!(rest.len(), 3);
    assert_eq!(rest[0]["reasoning_content"], "hm");
    assert_eq!(rest[2]["tool_calls"][0]["function"]["arguments"], "}");
    let end = answer.end();
    assert_eq!(end.finish, Finish::Other("tool_calls".into()));
    assert!(end.cost.estimated && end.cost.nano_usd > 0, "it reported no usage: {:?}", end.cost);
    let body = &mock.seen()[0].body;
    for name in ["tools", "response_format", "novelty"] {
        assert_eq!(body[name], fields[name], "{name}");
    }
}

#[tokio::test]
async fn an_answer_goes_on_from_its_beginning() {
    let mock = Mock::start(vec![Script::chat(&[" blue."])]);
    let fields = fields();
    let upstream = upstream(&mock, "prefill = \"plain\"");
    let (text, _) = read(upstream.ask(&ask(&fields, "The sky is")).await.unwrap()).await;
    assert_eq!(text, " blue.");
    let messages = &mock.seen()[0].body["messages"];
    assert_eq!(messages[1], json!({ "role": "assistant", "content": "The sky is" }));
}

#[tokio::test]
async fn anthropic_is_spoken_too() {
    let data = [
        json!({ "type": "message_start", "message": { "usage": { "input_tokens": 10, "output_tokens": 1 } } }),
        json!({ "type": "content_block_start", "index": 0, "content_block": { "type": "text", "text": "" } }),
        json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "text_delta", "text": " blue" } }),
        json!({ "type": "message_delta", "delta": { "stop_reason": "max_tokens" }, "usage": { "output_tokens": 2 } }),
        json!({ "type": "message_stop" }),
    ];
    let mock = Mock::start(vec![Script::events(&data.map(|event| event.to_string()))]);
    let upstream = upstream(&mock, "api = \"anthropic\"\nauth = \"x_api_key\"\nprefill = \"plain\"");
    let fields = fields();
    let (text, end) = read(upstream.ask(&ask(&fields, "It is ")).await.unwrap()).await;
    let end = end.unwrap();
    assert_eq!((text.as_str(), end.finish, end.cost.nano_usd), ("blue", Finish::Length, 14_000));
    let seen = &mock.seen()[0];
    assert_eq!((seen.path.as_str(), seen.headers["x-api-key"].as_str()), ("/v1/messages", "sk-secret-123"));
    assert_eq!(seen.headers["anthropic-version"], "2023-06-01");
    assert_eq!(seen.body["messages"][1]["content"][0]["text"], "It is", "no white space at its end");
}

#[tokio::test]
async fn an_answer_that_is_not_streamed_is_taken_whole() {
    let message = json!({ "role": "assistant", "content": "Hi." });
    let choice = json!({ "index": 0, "message": message, "finish_reason": "stop" });
    let usage = json!({ "prompt_tokens": 4, "completion_tokens": 2, "cost": 0.0001 });
    let body = json!({ "object": "chat.completion", "choices": [choice], "usage": usage }).to_string();
    let mock = Mock::start(vec![Script::new(200, "application/json", &body)]);
    let fields = fields();
    let (text, end) = read(upstream(&mock, "").ask(&ask(&fields, "")).await.unwrap()).await;
    assert_eq!((text.as_str(), end.unwrap().cost.nano_usd), ("Hi.", 100_000), "its own account counts");
}

#[tokio::test]
async fn an_engine_tells_of_itself() {
    let mock = Mock::start(vec![]);
    let list = json!({ "data": [{ "id": "Qwen/Q", "max_model_len": 4096 }] }).to_string();
    mock.put("/v1/models", Script::new(200, "application/json", &list));
    let own = upstream(&mock, "like = \"vllm\"\nmodels = []");
    assert!(own.models().await.is_err(), "it isn't well yet");
    mock.put("/health", Script::new(200, "text/plain", ""));
    let metrics = "vllm:num_requests_running{m=\"a\"} 3\nvllm:num_requests_waiting{m=\"a\"} 2\n";
    mock.put("/metrics", Script::new(200, "text/plain", metrics));
    assert_eq!(own.models().await.unwrap(), [Found { name: "Qwen/Q".into(), context: Some(4096) }]);
    assert_eq!(own.queue().await, Some(Queue { running: 3, waiting: 2 }));
}
