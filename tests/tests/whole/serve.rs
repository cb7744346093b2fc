//! `weir serve` as a process: what it says and how it ends when something is wrong.
use std::time::{Duration, Instant};
use weir_tests::{Connection, Serve};

const NULL: [&str; 2] = ["--model", "null"];
const LONG: &str = r#"{"model":"null","prompt":"x","max_tokens":100000,"ignore_eos":true,"stream":true}"#;

/// Ends by itself with code 1 and says every one of `words`, without a panic.
fn check_refused(mut serve: Serve, words: &[&str]) {
    let status = serve.ended(Duration::from_secs(60));
    let said = serve.stderr();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(words.iter().all(|word| said.contains(word)), "{words:?} in: {said}");
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn a_port_in_use() {
    let first = Serve::start(&NULL, &[]);
    let address = first.address.to_string();
    check_refused(Serve::spawn(first.address, &NULL, &[]), &[&address, "--http"]);
    assert_eq!(first.get("/healthz").unwrap().status, 200, "the first goes on");
}

#[test]
fn an_open_gateway_off_loopback() {
    check_refused(Serve::spawn("0.0.0.0:0".parse().unwrap(), &NULL, &[]), &["WEIR_API_KEY"]);
}

#[test]
fn a_model_that_is_not_there() {
    let address = "127.0.0.1:0".parse().unwrap();
    check_refused(Serve::spawn(address, &["--model", "/nowhere/x.gguf"], &[]), &["/nowhere/x.gguf"]);
    check_refused(Serve::spawn(address, &["--model", "no-such-model"], &[]), &["no-such-model"]);
}

#[test]
fn a_model_file_that_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("broken.gguf");
    std::fs::write(&file, b"GGUF and then nothing of the kind").unwrap();
    let path = file.to_str().unwrap();
    check_refused(Serve::spawn("127.0.0.1:0".parse().unwrap(), &["--model", path], &[]), &["broken.gguf"]);
}

#[test]
fn requests_that_make_no_sense() {
    let serve = Serve::start(&NULL, &[]);
    let unknown = serve.post("/v1/completions", r#"{"model":"gpt-9","prompt":"x"}"#).unwrap();
    assert_eq!((unknown.status, &unknown.json()["error"]["code"]), (404, &"model_not_found".into()));
    let broken = serve.post("/v1/completions", r#"{"model":"#).unwrap();
    assert_eq!((broken.status, &broken.json()["error"]["code"]), (400, &"invalid_json".into()));
    assert_eq!(serve.post("/v1/completions", r#"{"model":"null","prompt":"x"}"#).unwrap().status, 200);
}

#[test]
fn an_engine_that_dies() {
    let serve = Serve::start(&["--model", "null:fail_after=30"], &[]);
    assert_eq!(serve.get("/healthz").unwrap().status, 200);
    let answer = serve.post("/v1/completions", r#"{"model":"null","prompt":"x","max_tokens":50}"#).unwrap();
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (500, &"internal_error".into()));
    // the answer comes before the engine has said how it is
    let until = Instant::now() + Duration::from_secs(10);
    while serve.get("/healthz").unwrap().status == 200 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(serve.get("/healthz").unwrap().status, 503);
    assert!(!serve.stderr().contains("panicked"), "{}", serve.stderr());
}

#[test]
fn an_interrupt_in_the_middle_of_a_stream() {
    for signal in ["INT", "TERM"] {
        let mut serve = Serve::start(&NULL, &[]);
        let mut stream = Connection::open(serve.address, "POST", "/v1/completions", LONG).unwrap();
        assert!(stream.some().unwrap().starts_with("HTTP/1.1 200"));
        serve.signal(signal);
        let status = serve.ended(Duration::from_secs(10));
        assert!(status.code().is_some(), "it ends by itself: {status}");
        assert!(!serve.stderr().contains("panicked"), "{}", serve.stderr());
        let rest = stream.rest().unwrap_or_default();
        assert!(rest.contains("shutting_down") || rest.contains("[DONE]"), "the client is told");
    }
}

#[test]
fn an_interrupt_with_nothing_to_do() {
    let mut serve = Serve::start(&NULL, &[]);
    serve.signal("INT");
    assert!(serve.ended(Duration::from_secs(3)).code().is_some());
}
