//! Clients that send too much, too slowly, too many, or go away; and the gateway's end.
use super::server::{Server, read_reply};
use serde_json::json;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use weir::driver::ModelSpec;
use weir::gateway::GatewayConfig;

const MODEL: &str = ModelSpec::NULL;
const HEAD: &str = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n";

fn small(c: &mut GatewayConfig) {
    c.limits.body_bytes_max = 10_000;
    c.limits.header_timeout = Duration::from_millis(300);
    c.limits.body_timeout = Duration::from_millis(300);
}

/// Begins an answer of about as many tokens as the context holds.
async fn begin_long(server: &Server, stream: bool) -> TcpStream {
    let body = json!({ "model": MODEL, "prompt": "x", "max_tokens": 1_000_000, "ignore_eos": true, "stream": stream }).to_string();
    let mut socket = server.connect().await;
    let head = format!("{HEAD}content-length: {}\r\n\r\n{body}", body.len());
    socket.write_all(head.as_bytes()).await.unwrap();
    socket
}

/// Waits until the first bytes of an event have come.
async fn first_bytes(socket: &mut TcpStream) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    let length = timeout(Duration::from_secs(10), socket.read(&mut bytes)).await.unwrap().unwrap();
    bytes.truncate(length);
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_are_too_long() {
    let server = Server::with(small).await;
    let body = vec![b' '; 1_000_000];
    let announced = server.send("POST", "/v1/completions", "content-type: application/json\r\n", &body).await;
    assert_eq!(announced.error(), (413, "request_too_large".into(), String::new()));

    let mut socket = server.connect().await;
    socket.write_all(format!("{HEAD}transfer-encoding: chunked\r\n\r\n").as_bytes()).await.unwrap();
    for _ in 0..20 {
        let _ = socket.write_all(format!("400\r\n{}\r\n", " ".repeat(1024)).as_bytes()).await;
    }
    let _ = socket.write_all(b"0\r\n\r\n").await;
    assert_eq!(read_reply(&mut socket).await.error().0, 413);
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_and_bodies_that_come_too_slowly() {
    let server = Server::with(small).await;
    let mut body = server.connect().await;
    body.write_all(format!("{HEAD}content-length: 100\r\n\r\n{{").as_bytes()).await.unwrap();
    assert_eq!(read_reply(&mut body).await.error(), (408, "timeout".into(), String::new()));

    let mut head = server.connect().await;
    let start = Instant::now();
    let mut closed = false;
    for byte in HEAD.bytes().cycle() {
        let mut buffer = [0; 16];
        if head.write_all(&[byte]).await.is_err() {
            closed = true;
        } else if let Ok(Ok(0) | Err(_)) = timeout(Duration::from_millis(20), head.read(&mut buffer)).await {
            closed = true;
        }
        if closed || start.elapsed() > Duration::from_secs(10) {
            break;
        }
    }
    assert!(closed, "a head that trickles in is cut off");
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_that_are_malformed_or_too_long() {
    let server = Server::start().await;
    for bytes in [b"\x16\x03\x01\x02\x00\x01\x00".to_vec(), b"GET / HTTP/9.9\r\n\r\n".to_vec(), {
        format!("GET / HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "a".repeat(200_000)).into_bytes()
    }] {
        let mut socket = server.connect().await;
        let _ = socket.write_all(&bytes).await;
        let status = read_reply(&mut socket).await.status;
        assert!([0, 400, 431, 505].contains(&status), "{status}");
    }
    assert_eq!(server.get("/healthz").await.status, 200, "others are served");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_cancels_its_work() {
    for stream in [true, false] {
        let server = Server::with(|c| c.limits.requests_max = 1).await;
        let mut socket = begin_long(&server, stream).await;
        if stream {
            first_bytes(&mut socket).await;
        } else {
            sleep(Duration::from_millis(50)).await;
        }
        let request = json!({ "model": MODEL, "prompt": "x", "max_tokens": 1 });
        let busy = server.complete(&request).await;
        assert_eq!(busy.error(), (429, "too_many_requests".into(), String::new()), "stream: {stream}");
        assert!(busy.header("retry-after").is_some());
        drop(socket);
        let start = Instant::now();
        while server.complete(&request).await.status != 200 {
            assert!(start.elapsed() < Duration::from_secs(2), "its place is still taken; stream: {stream}");
            sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_reading_is_cut_off() {
    let server = Server::with(|c| {
        c.limits.requests_max = 1;
        c.limits.stall_timeout = Duration::from_millis(300);
    })
    .await;
    // More than the sockets' buffers hold, so it can't end by itself while nobody reads.
    let request = json!({ "model": MODEL, "prompt": "x", "max_tokens": 1_000_000, "ignore_eos": true,
        "stream": true, "n": 16, "logprobs": 20 });
    let body = request.to_string();
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut socket = socket.connect(server.address).await.unwrap();
    let head = format!("{HEAD}content-length: {}\r\n\r\n{body}", body.len());
    socket.write_all(head.as_bytes()).await.unwrap();
    first_bytes(&mut socket).await;
    let request = json!({ "model": MODEL, "prompt": "x", "max_tokens": 1 });
    let start = Instant::now();
    while server.complete(&request).await.status != 200 {
        assert!(start.elapsed() < Duration::from_secs(60), "its place is still taken");
        sleep(Duration::from_millis(50)).await;
    }
    drop(socket);
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_connections() {
    let server = Server::with(|c| c.limits.connections_max = 2).await;
    let _idle = [server.connect().await, server.connect().await];
    sleep(Duration::from_millis(50)).await;
    let mut third = server.connect().await;
    assert_eq!(read_reply(&mut third).await.error().0, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_take_too_long() {
    let server = Server::with(|c| c.limits.request_timeout = Duration::ZERO).await;
    let request = json!({ "model": MODEL, "prompt": "x", "max_tokens": 100_000, "ignore_eos": true });
    let reply = server.complete(&request).await;
    assert_eq!(reply.error(), (504, "timeout".into(), String::new()));
}

/// The null model takes 10 ms for the first token; the rest may take as long as it likes.
#[tokio::test(flavor = "multi_thread")]
async fn a_first_token_that_comes_too_late() {
    let server = Server::paced("null:step_us=30000", |_| ()).await;
    for stream in [false, true] {
        let request = |ttft_ms: u32, n: u32| {
            json!({ "model": MODEL, "prompt": "x", "max_tokens": 5, "n": n, "stream": stream,
                "weir": { "ttft_ms": ttft_ms } })
        };
        let late = server.complete(&request(1, 2)).await;
        assert_eq!(late.error(), (504, "timeout".into(), String::new()));
        assert!(late.body.contains("ttft_ms"), "{late:?}");
        assert_eq!(server.complete(&request(60_000, 1)).await.status, 200);
    }
    // what was late is cancelled: 100 tokens would take 3 s, and there are 16 slots
    let body = json!({ "model": MODEL, "prompt": "x", "max_tokens": 100, "weir": { "ttft_ms": 1 } });
    let start = Instant::now();
    for _ in 0..64 {
        assert_eq!(server.complete(&body).await.status, 504);
    }
    let next = json!({ "model": MODEL, "prompt": "x", "max_tokens": 1 });
    assert_eq!(server.complete(&next).await.status, 200);
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn several_requests_on_one_connection() {
    let server = Server::start().await;
    let mut socket = server.connect().await;
    for _ in 0..3 {
        let request = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n";
        socket.write_all(request).await.unwrap();
        assert!(first_bytes(&mut socket).await.starts_with(b"HTTP/1.1 200"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_cuts_what_does_not_finish() {
    let mut server = Server::with(|c| c.limits.grace = Duration::from_millis(200)).await;
    let mut streamed = begin_long(&server, true).await;
    let mut whole = begin_long(&server, false).await;
    first_bytes(&mut streamed).await;
    let address = server.address;
    server.stop();
    let reply = read_reply(&mut whole).await;
    assert_eq!(reply.error(), (503, "shutting_down".into(), String::new()));
    let mut rest = String::new();
    timeout(Duration::from_secs(5), streamed.read_to_string(&mut rest)).await.unwrap().unwrap();
    assert!(
        rest.contains("shutting_down") && !rest.contains("[DONE]"),
        "{}",
        &rest[rest.len().saturating_sub(400)..]
    );
    server.ended().await;
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_waits_for_what_finishes() {
    let mut server = Server::start().await;
    let body = json!({ "model": MODEL, "prompt": "x", "max_tokens": 20, "ignore_eos": true, "stream": true })
        .to_string();
    let mut socket = server.connect().await;
    let head = format!("{HEAD}content-length: {}\r\n\r\n{body}", body.len());
    socket.write_all(head.as_bytes()).await.unwrap();
    let first = first_bytes(&mut socket).await;
    server.stop();
    let mut rest = String::from_utf8(first).unwrap();
    timeout(Duration::from_secs(5), socket.read_to_string(&mut rest)).await.unwrap().unwrap();
    assert!(rest.contains("[DONE]"), "{rest}");
    server.ended().await;
}
