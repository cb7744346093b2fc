//! What comes back when something is wrong with a request, or with who sends it.
use super::server::Server;
use serde_json::{Value, json};
use weir::driver::{Driver, DriverConfig, ModelSpec};
use weir::gateway::{GatewayConfig, GatewayError, serve};

const MODEL: &str = ModelSpec::NULL;
const CHAT: &str = "/v1/chat/completions";
const COMPLETE: &str = "/v1/completions";
const JSON: &str = "content-type: application/json\r\n";

/// A request with these fields is refused with 400, this code and about this field.
async fn check(server: &Server, path: &str, fields: Value, code: &str, param: &str) {
    let mut request = json!({ "model": MODEL });
    if path == CHAT {
        request["messages"] = json!([{ "role": "user", "content": "Hello" }]);
    } else {
        request["prompt"] = json!("Hello");
    }
    request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let reply = server.post(path, &request).await;
    assert_eq!(reply.error(), (400, code.into(), param.into()), "{fields}: {reply:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_out_of_range_or_of_the_wrong_type() {
    let server = Server::start().await;
    for (fields, code, param) in [
        (json!({ "temperature": "hot" }), "invalid_type", "temperature"),
        (json!({ "temperature": 2.5 }), "decimal_above_max_value", "temperature"),
        (json!({ "temperature": -0.1 }), "decimal_below_min_value", "temperature"),
        (json!({ "top_p": 1.01 }), "decimal_above_max_value", "top_p"),
        (json!({ "top_k": 1.5 }), "invalid_type", "top_k"),
        (json!({ "min_p": -1 }), "decimal_below_min_value", "min_p"),
        (json!({ "repetition_penalty": 0 }), "decimal_below_min_value", "repetition_penalty"),
        (json!({ "presence_penalty": 3 }), "decimal_above_max_value", "presence_penalty"),
        (json!({ "n": 0 }), "integer_below_min_value", "n"),
        (json!({ "n": 17 }), "integer_above_max_value", "n"),
        (json!({ "max_tokens": 0 }), "integer_below_min_value", "max_tokens"),
        (json!({ "max_tokens": u64::MAX }), "integer_above_max_value", "max_tokens"),
        (json!({ "seed": 1.5 }), "invalid_type", "seed"),
        (json!({ "stop": ["a", "b", "c", "d", "e"] }), "invalid_value", "stop"),
        (json!({ "stop": "" }), "invalid_value", "stop"),
        (json!({ "stop": [1] }), "invalid_type", "stop"),
        (json!({ "stream": "yes" }), "invalid_type", "stream"),
        (json!({ "stream_options": { "include_usage": true } }), "invalid_value", "stream_options"),
        (json!({ "logit_bias": { "x": 1 } }), "invalid_value", "logit_bias"),
        (json!({ "logit_bias": { "1": 101 } }), "invalid_value", "logit_bias"),
        (json!({ "logit_bias": { "4000000000": 1 } }), "invalid_value", "logit_bias"),
        (json!({ "weir": { "priority": "first" } }), "invalid_value", "weir.priority"),
        (json!({ "weir": { "tags": { "a": 1 } } }), "invalid_value", "weir.tags"),
        (json!({ "weir": { "model_size": "tiny" } }), "invalid_value", "weir.model_size"),
        (json!({ "weir": { "model_size": 7 } }), "invalid_type", "weir.model_size"),
        (json!({ "weir": { "ttft_ms": 0 } }), "integer_below_min_value", "weir.ttft_ms"),
        (json!({ "weir": { "ttft_ms": "soon" } }), "invalid_type", "weir.ttft_ms"),
    ] {
        check(&server, CHAT, fields.clone(), code, param).await;
        check(&server, COMPLETE, fields, code, param).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chats_that_make_no_sense() {
    let server = Server::start().await;
    for (fields, code, param) in [
        (json!({ "messages": null }), "missing_required_parameter", "messages"),
        (json!({ "messages": [] }), "empty_array", "messages"),
        (json!({ "messages": "Hello" }), "invalid_type", "messages"),
        (json!({ "messages": ["Hello"] }), "invalid_type", "messages[0]"),
        (json!({ "messages": [{ "role": "king", "content": "" }] }), "invalid_value", "messages[0].role"),
        (json!({ "messages": [{ "role": "user" }] }), "missing_required_parameter", "messages[0].content"),
        (json!({ "messages": [{ "role": "user", "content": 1 }] }), "invalid_type", "messages[0].content"),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }),
            "unsupported_content",
            "messages[0].content",
        ),
        (json!({ "response_format": { "type": "xml" } }), "invalid_value", "response_format.type"),
        (json!({ "modalities": ["audio"] }), "unsupported_parameter", "modalities"),
        (json!({ "tool_choice": "required" }), "invalid_value", "tool_choice"),
        (json!({ "tools": [1] }), "invalid_type", "tools"),
        (json!({ "top_logprobs": 3 }), "invalid_value", "top_logprobs"),
        (json!({ "logprobs": true, "top_logprobs": 21 }), "integer_above_max_value", "top_logprobs"),
        (json!({ "max_completion_tokens": -1 }), "integer_below_min_value", "max_completion_tokens"),
    ] {
        check(&server, CHAT, fields, code, param).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_that_make_no_sense() {
    let server = Server::start().await;
    for (fields, code, param) in [
        (json!({ "prompt": null }), "missing_required_parameter", "prompt"),
        (json!({ "prompt": [] }), "empty_array", "prompt"),
        (json!({ "prompt": {} }), "invalid_type", "prompt"),
        (json!({ "prompt": [1, "a"] }), "invalid_type", "prompt"),
        (json!({ "prompt": [-1] }), "invalid_type", "prompt"),
        (json!({ "prompt": [4_000_000_000u32] }), "invalid_value", "prompt"),
        (json!({ "prompt": vec!["x"; 40], "n": 2 }), "too_many_choices", "prompt"),
        (json!({ "prompt": vec!["x"; 100_000], "weir": {} }), "too_many_choices", "prompt"),
        (json!({ "suffix": "end" }), "unsupported_parameter", "suffix"),
        (json!({ "best_of": 2 }), "unsupported_parameter", "best_of"),
        (json!({ "echo": true, "logprobs": 1 }), "unsupported_parameter", "echo"),
        (json!({ "logprobs": true }), "invalid_type", "logprobs"),
    ] {
        check(&server, COMPLETE, fields, code, param).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_past_the_context() {
    let server = Server::start().await;
    let context = server.driver.models()[0].context as usize;
    let long = vec![7; context];
    check(&server, COMPLETE, json!({ "prompt": long }), "context_length_exceeded", "prompt").await;
    let messages = json!([{ "role": "user", "content": "word ".repeat(context * 4) }]);
    check(&server, CHAT, json!({ "messages": messages }), "context_length_exceeded", "messages").await;
    let fits = server.complete(&json!({ "model": MODEL, "prompt": vec![7; context - 1] })).await;
    assert_eq!(fits.json()["usage"]["completion_tokens"], 1, "max_tokens is cut to what fits: {fits:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn models_that_are_not_there() {
    let server = Server::start().await;
    let messages = json!([{ "role": "user", "content": "Hello" }]);
    for request in [json!({ "model": "gpt-9", "messages": messages }), json!({ "messages": messages })] {
        let reply = server.chat(&request).await;
        assert_eq!(reply.error(), (404, "model_not_found".into(), "model".into()));
        assert!(reply.body.contains(MODEL), "it lists what there is: {reply:?}");
    }
    assert_eq!(server.get("/v1/models/gpt-9").await.error().0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn models_go_by_their_other_names() {
    let other = |name: &str, model: &str| (name.to_owned(), model.to_owned());
    let server =
        Server::with(|c| c.aliases = vec![other("nothing", MODEL), other("elsewhere", "absent")]).await;
    for (name, status) in [("nothing", 200), ("owner/Nothing.gguf", 200), ("elsewhere", 404), ("absent", 404)]
    {
        let reply = server.complete(&json!({ "model": name, "prompt": "x" })).await;
        assert_eq!(reply.status, status, "{name}: {reply:?}");
        assert!(status != 200 || reply.json()["model"] == MODEL, "{reply:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_are_not_json() {
    let server = Server::start().await;
    let deep = "[".repeat(100_000);
    for body in [
        b"".as_slice(),
        b"{",
        b"[]",
        b"\"text\"",
        b"{\"temperature\": NaN}",
        b"{\"temperature\": 1e999}",
        b"{\"model\": \"\xff\"}",
        b"{\"model\": \"\\ud800\"}",
        deep.as_bytes(),
    ] {
        let reply = server.send("POST", CHAT, JSON, body).await;
        let shown = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
        assert_eq!(reply.error(), (400, "invalid_json".into(), String::new()), "{shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_places_and_methods() {
    let server = Server::start().await;
    let check = async |method: &str, path: &str, headers: &str, status: u16| {
        let reply = server.send(method, path, headers, b"{}").await;
        assert_eq!(reply.error().0, status, "{method} {path} {headers}");
        reply
    };
    check("GET", "/nothing", "", 404).await;
    check("GET", "/v1/nothing", "", 404).await;
    check("GET", "/v1/models/%ff", "", 404).await;
    assert_eq!(check("GET", CHAT, "", 405).await.header("allow"), Some("post"));
    assert_eq!(check("DELETE", "/v1/models", "", 405).await.header("allow"), Some("get"));
    check("POST", CHAT, "", 415).await;
    check("POST", CHAT, "content-type: text/plain\r\n", 415).await;
    check("POST", CHAT, &format!("{JSON}content-encoding: gzip\r\n"), 415).await;
    check("GET", "/v1/models", "host: evil.example\r\n", 403).await;
    check("GET", "/v1/models", "origin: https://evil.example\r\n", 403).await;
    check("GET", "/v1/models", "origin: null\r\n", 403).await;
    check("OPTIONS", CHAT, "origin: https://evil.example\r\naccess-control-request-method: POST\r\n", 403)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_and_origins_that_are_allowed() {
    let server = Server::with(|c| {
        c.allowed_hosts = vec!["Weir.Example".into()];
        c.allowed_origins = vec!["https://app.example".into()];
    })
    .await;
    for headers in [
        "host: weir.example:8484\r\n",
        "host: 127.0.0.1\r\n",
        "host: localhost:1\r\norigin: http://localhost:1\r\n",
    ] {
        assert_eq!(server.send("GET", "/v1/models", headers, b"").await.status, 200, "{headers}");
    }
    let origin = "origin: https://app.example\r\n";
    let reply = server.send("GET", "/v1/models", origin, b"").await;
    assert_eq!(reply.header("access-control-allow-origin"), Some("https://app.example"));
    let asked = "access-control-request-method: POST\r\naccess-control-request-headers: authorization,x-stainless-os\r\n";
    let reply = server.send("OPTIONS", CHAT, &format!("{origin}{asked}"), b"").await;
    assert_eq!(reply.status, 204);
    assert_eq!(reply.header("access-control-allow-origin"), Some("https://app.example"));
    assert_eq!(reply.header("access-control-allow-headers"), Some("authorization,x-stainless-os"));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys() {
    let server = Server::with(|c| c.api_key = Some("secret-1".into())).await;
    let check = async |headers: &str, status: u16, code: &str| {
        let reply = server.send("GET", "/v1/models", headers, b"").await;
        assert_eq!(reply.status, status, "{headers}");
        if status != 200 {
            assert_eq!(reply.error().1, code);
            assert_eq!(reply.json()["error"]["type"], "authentication_error");
        }
    };
    check("authorization: Bearer secret-1\r\n", 200, "").await;
    check("authorization: bearer secret-1\r\n", 200, "").await;
    check("", 401, "missing_api_key").await;
    check("authorization: Basic c2VjcmV0LTE=\r\n", 401, "missing_api_key").await;
    check("authorization: Bearer\r\n", 401, "missing_api_key").await;
    check("authorization: Bearer secret-2\r\n", 401, "invalid_api_key").await;
    check("authorization: Bearer secret-11\r\n", 401, "invalid_api_key").await;
    assert_eq!(server.get("/healthz").await.status, 200, "probes have no key");
    assert_eq!(server.get("/nowhere").await.status, 401, "strangers learn nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_that_can_not_be_listened_on() {
    let server = Server::start().await;
    let driver = Driver::start(DriverConfig::default()).await.unwrap();
    let taken = serve(driver.clone(), GatewayConfig::new(server.address), async {}).await.unwrap_err();
    assert!(matches!(taken, GatewayError::Bind { .. }));
    assert!(taken.to_string().contains(&server.address.to_string()) && taken.to_string().contains("--http"));

    let open = GatewayConfig::new("0.0.0.0:0".parse().unwrap());
    let refused = serve(driver.clone(), open.clone(), async {}).await.unwrap_err();
    assert!(matches!(refused, GatewayError::KeyRequired { .. }), "{refused}");
    let keyed = |key: &str| GatewayConfig { api_key: Some(key.into()), ..open.clone() };
    let clear = serve(driver.clone(), keyed("k"), async {}).await.unwrap_err();
    assert!(matches!(clear, GatewayError::TlsRequired { .. }), "{clear}");
    let proxied = GatewayConfig { insecure_http: true, ..keyed("k") };
    serve(driver.clone(), proxied, async {}).await.unwrap();
    let bad = serve(driver, GatewayConfig { insecure_http: true, ..keyed("with space") }, async {}).await;
    assert!(matches!(bad, Err(GatewayError::BadKey)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_without_a_model_is_not_ready() {
    let driver = Driver::start(DriverConfig::default()).await.unwrap();
    let health = driver.health();
    assert!(!health.ready && !health.detail.is_empty());
}
