//! The client against servers that behave, and servers that don't.
#![allow(clippy::unwrap_used)]
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use weir_client::{
    Answer, ClientError, End, Endpoint, Finish, LocalOptions, Message, Options, Piece, Priority, Usage, Weir,
};

/// A request as it came: its first line, its headers in lower case, its body.
struct Seen {
    line: String,
    head: String,
    body: serde_json::Value,
}

fn read_request(stream: &TcpStream) -> Option<Seen> {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut line, mut head) = (String::new(), String::new());
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    loop {
        let mut next = String::new();
        reader.read_line(&mut next).unwrap();
        if next.trim().is_empty() {
            break;
        }
        head += &next.to_ascii_lowercase();
    }
    let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).unwrap();
    Some(Seen { line, head, body: serde_json::from_slice(&body).unwrap_or_default() })
}

/// A server that answers each request with what `reply` writes; gives its address and the requests.
fn serve(reply: impl Fn(&Seen, &mut TcpStream) + Send + Sync + 'static) -> (String, Receiver<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, seen) = channel();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let Some(request) = read_request(&stream) else { continue };
            reply(&request, &mut stream);
            let _ = sender.send(request);
        }
    });
    (url, seen)
}

/// A server whose every answer is `bytes`, and then the end of the connection.
fn canned(bytes: impl Into<Vec<u8>>) -> (String, Receiver<Seen>) {
    let bytes = bytes.into();
    serve(move |_, stream| _ = stream.write_all(&bytes))
}

fn sse(events: &[&str]) -> String {
    let body: String = events.iter().map(|e| format!("data: {e}\n\n")).collect();
    format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n{body}")
}

const HELLO: &[&str] = &[
    r#"{"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}"#,
    r#"{"model":"m","choices":[{"index":0,"delta":{"content":"Hel"}}]}"#,
    r#"{"model":"m","choices":[{"index":0,"delta":{"content":"lo €"}}],"error":null}"#,
    r#"{"model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#,
    r#"{"model":"m","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":3}},"weir":{"nodes":["a","b"]}}"#,
    "[DONE]",
];

fn options() -> Options {
    Options { model: Some("m".into()), ..Options::default() }
}

fn client(url: &str) -> Weir {
    let mut weir = Weir::new();
    let patience = Duration::from_millis(500);
    weir.add("here", Endpoint::Gateway { url: url.into(), key: Some("k".into()), patience });
    weir
}

fn ask(url: &str) -> Answer {
    client(url).chat(vec![Message::user("hi")], options()).unwrap()
}

/// What came before the end, and the end.
async fn read(mut answer: Answer) -> (String, Result<End, ClientError>) {
    let mut text = String::new();
    loop {
        match answer.next().await.expect("an end or an error before the end") {
            Ok(Piece::Text(more)) => text += &more,
            Ok(Piece::End(end)) => {
                assert!(answer.next().await.is_none());
                return (text, Ok(end));
            }
            Err(error) => {
                assert!(answer.next().await.is_none());
                return (text, Err(error));
            }
        }
    }
}

#[tokio::test]
async fn a_conversation_is_answered() {
    let (url, seen) = canned(sse(HELLO));
    let options = Options {
        max_tokens: Some(9),
        temperature: Some(0.5),
        top_p: Some(0.5),
        seed: Some(3),
        stop: vec!["x".into()],
        priority: Some(Priority::Background),
        ttft: Some(Duration::from_millis(1500)),
        tags: vec![("team".into(), "blue".into())],
        ..options()
    };
    let messages = vec![Message::system("be kind"), Message::user("hi")];
    let (text, end) = client(&url).chat(messages, options).unwrap().text().await.unwrap();
    assert_eq!(text, "Hello €");
    let usage = Usage { prompt_tokens: 7, cached_tokens: 3, output_tokens: 2 };
    assert_eq!(
        end,
        End { finish: Finish::Stop, usage, model: "m".into(), nodes: vec!["a".into(), "b".into()] }
    );
    let request = seen.recv().unwrap();
    assert!(request.line.starts_with("POST /v1/chat/completions "), "{}", request.line);
    assert!(request.head.contains("authorization: bearer k\r\n"), "{}", request.head);
    assert_eq!(request.body["messages"][1], serde_json::json!({ "role": "user", "content": "hi" }));
    for (name, value) in [("max_tokens", 9.0), ("temperature", 0.5), ("top_p", 0.5), ("seed", 3.0)] {
        assert_eq!(request.body[name].as_f64(), Some(value), "{name}");
    }
    assert_eq!(request.body["stop"][0], "x");
    let weir = serde_json::json!({ "priority": "background", "ttft_ms": 1500, "tags": { "team": "blue" } });
    assert_eq!(request.body["weir"], weir);
}

#[tokio::test]
async fn a_prompt_is_completed_by_the_first_model() {
    let (url, seen) = serve(|request, stream| {
        let list = r#"{"object":"list","data":[{"id":"first"},{"id":"second"}]}"#;
        let text = [r#"{"choices":[{"text":" b","finish_reason":"length"}]}"#, "[DONE]"];
        let reply = match request.line.starts_with("GET /v1/models ") {
            true => format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{list}", list.len()),
            false => sse(&text),
        };
        let _ = stream.write_all(reply.as_bytes());
    });
    let weir = client(&url);
    for _ in 0..2 {
        let (text, end) = weir.complete("a", Options::default()).unwrap().text().await.unwrap();
        assert_eq!((text.as_str(), end.finish), (" b", Finish::Length));
    }
    assert_eq!(weir.models(Some("here")).await.unwrap(), ["first", "second"]);
    let requests: Vec<Seen> = (0..4).map(|_| seen.recv().unwrap()).collect();
    assert!(requests.iter().all(|r| r.body["weir"].is_null()), "strangers get nothing that they don't know");
    let lines: Vec<String> = requests.into_iter().map(|r| r.line).collect();
    let posts = lines.iter().filter(|l| l.starts_with("POST /v1/completions ")).count();
    assert_eq!((posts, lines.len()), (2, 4), "{lines:?}");
}

#[tokio::test]
async fn servers_that_misbehave_are_clear_errors() {
    async fn check(reply: String, says: &[&str]) {
        let (url, _seen) = canned(reply.clone());
        let error = read(ask(&url)).await.1.expect_err(&reply).to_string();
        for part in says {
            assert!(error.contains(part), "{reply:?} gave {error:?}, which lacks {part:?}");
        }
    }
    let refusal = r#"{"error":{"message":"no model `m`","type":"invalid_request_error"}}"#;
    check(format!("HTTP/1.1 404 Not Found\r\nconnection: close\r\n\r\n{refusal}"), &["no model `m`", "404"])
        .await;
    check("HTTP/1.1 502 Bad\r\nconnection: close\r\n\r\n<html>oh\u{1b}[2J".into(), &["<html>oh [2J", "502"])
        .await;
    check("HTTP/1.1 500 X\r\nconnection: close\r\n\r\n".into(), &["500"]).await;
    check("SSH-2.0-OpenSSH_9.2\r\n".into(), &["127.0.0.1"]).await;
    check(String::new(), &["broke"]).await;
    check(sse(&["nonsense"]), &["doesn't speak", "nonsense"]).await;
    check(sse(&HELLO[..3]), &["broke", "end"]).await;
    check(sse(&[r#"{"error":{"message":"the node died"}}"#]), &["the node died"]).await;
    check(sse(&["x".repeat(2 << 20).as_str()]), &["megabyte"]).await;
    check(format!("HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n{}", "data: "), &["broke"]).await;
}

#[tokio::test]
async fn text_before_a_failure_is_delivered() {
    let (url, _seen) = canned(sse(&[HELLO[1], r#"{"error":"overloaded"}"#]));
    let (text, end) = read(ask(&url)).await;
    assert_eq!((text.as_str(), end), ("Hel", Err(ClientError::Failed("overloaded".into()))));
}

#[tokio::test]
async fn silence_and_absence_are_noticed() {
    let (url, _seen) = serve(|_, stream| {
        let _ = stream.write_all(sse(&HELLO[..2]).as_bytes());
        std::thread::sleep(Duration::from_secs(20));
    });
    let started = Instant::now();
    let (text, end) = read(ask(&url)).await;
    assert!(matches!(end, Err(ClientError::Silent { .. })) && text == "Hel", "{end:?}");
    assert!(started.elapsed() < Duration::from_secs(5));
    let end = read(ask("http://127.0.0.1:1")).await.1.unwrap_err().to_string();
    assert!(end.contains("weir serve"), "{end}");
    assert!(matches!(read(ask("gopher://x")).await.1, Err(ClientError::Url(_))));
}

/// A server that goes on until its client is gone; its receiver hears of that.
fn endless() -> (String, Receiver<()>) {
    let (gone, heard) = channel();
    let (url, _) = serve(move |_, stream| {
        let _ = stream.write_all(sse(&HELLO[..1]).as_bytes());
        while stream.write_all(format!("data: {}\n\n", HELLO[1]).as_bytes()).is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = gone.send(());
    });
    (url, heard)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_or_cancelling_closes_the_connection() {
    let (url, gone) = endless();
    let mut answer = ask(&url);
    assert!(matches!(answer.next().await, Some(Ok(Piece::Text(_)))));
    drop(answer);
    gone.recv_timeout(Duration::from_secs(5)).expect("the connection to be closed");

    let (url, gone) = endless();
    let answer = ask(&url);
    let canceller = answer.canceller();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(50)).await;
        canceller.cancel();
    });
    assert_eq!(read(answer).await.1, Err(ClientError::Cancelled));
    gone.recv_timeout(Duration::from_secs(5)).expect("the connection to be closed");
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused_at_once() {
    let weir = client("http://127.0.0.1:1");
    let check = |options: Options, says: &str| {
        let error = weir.chat(vec![], options).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    check(Options { temperature: Some(f32::NAN), ..options() }, "temperature");
    check(Options { top_p: Some(0.0), ..options() }, "top_p");
    check(Options { max_tokens: Some(0), ..options() }, "max_tokens");
    check(Options { endpoint: Some("there".into()), ..options() }, "there are here");
    let error = Weir::new().complete("a", options()).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "no endpoint was added");
}

/// A small real model, from `WEIR_TEST_MODELS`.
fn model() -> Option<String> {
    let path = std::env::var("WEIR_TEST_MODELS").ok().map(|folder| format!("{folder}/smollm2.gguf"));
    let path = path.filter(|p| std::path::Path::new(p).is_file());
    if path.is_none() {
        assert!(std::env::var_os("CI").is_none(), "CI needs WEIR_TEST_MODELS, a folder with smollm2.gguf");
        eprintln!("SKIPPED: WEIR_TEST_MODELS is no folder with smollm2.gguf");
    }
    path
}

/// The same calls as to a gateway, answered by a model of this process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_of_this_process_answers() {
    let Some(model) = model() else { return };
    let cache = tempfile::tempdir().unwrap();
    let cache_path = cache.path().display().to_string();
    let local = LocalOptions::new(|name| (name == "WEIR_CACHE").then(|| cache_path.clone())).unwrap();
    let mut weir = Weir::new();
    weir.add("here", Endpoint::Local { model, options: LocalOptions { context: 256, ..local } });
    let greedy = Options { temperature: Some(0.0), max_tokens: Some(8), ..Options::default() };
    let answer = weir.complete("The capital of France is", greedy.clone()).unwrap();
    let (text, end) = answer.text().await.unwrap();
    assert!(text.contains("Paris"), "{text}");
    assert_eq!((end.finish, end.usage.output_tokens, end.model.as_str()), (Finish::Length, 8, "smollm2"));
    let chat = weir.chat(vec![Message::user("Say hello.")], greedy.clone()).unwrap();
    assert!(!chat.text().await.unwrap().0.is_empty());
    assert_eq!(weir.models(None).await.unwrap(), ["smollm2"]);

    // cancelled, and another still answers
    let mut long = weir.complete("Once upon a time", Options { max_tokens: None, ..greedy.clone() }).unwrap();
    assert!(matches!(long.next().await, Some(Ok(Piece::Text(_)))));
    drop(long);
    assert!(weir.complete("One, two,", greedy.clone()).unwrap().text().await.is_ok());

    let long = "word ".repeat(300);
    let error = weir.complete(long, greedy.clone()).unwrap().text().await.unwrap_err().to_string();
    assert!(error.contains("context"), "{error}");
    let error = weir.complete("x", Options { model: Some("other".into()), ..greedy }).unwrap().text().await;
    assert!(error.unwrap_err().to_string().contains("not other"));
}

#[tokio::test]
async fn a_model_that_is_not_here_is_a_clear_error() {
    let cache = tempfile::tempdir().unwrap();
    let cache_path = cache.path().display().to_string();
    let options = LocalOptions::new(|name| (name == "WEIR_CACHE").then(|| cache_path.clone())).unwrap();
    for (model, says) in
        [("smollm2-135m", "weir pull"), ("smolm2", "did you mean"), ("/none.gguf", "no file")]
    {
        let mut weir = Weir::new();
        weir.add("here", Endpoint::Local { model: model.into(), options: options.clone() });
        let error = read(weir.complete("x", Options::default()).unwrap()).await.1.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}
