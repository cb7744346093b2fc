//! The gateway's pages, and the model files that they compute with.
use super::server::{Reply, Server};
use std::io::Write;
use weir::gateway::{GatewayConfig, SharedFile};

const NAME: &str = "0101010101010101010101010101010101010101010101010101010101010101";
const KEY: &str = "authorization: Bearer secret\r\n";

/// A gateway with a key, and a file of so many bytes that count up.
async fn with_file(bytes: usize) -> (Server, tempfile::NamedTempFile) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let content: Vec<u8> = (0..bytes).map(|i| b'a' + (i % 26) as u8).collect();
    file.write_all(&content).unwrap();
    let shared = SharedFile { name: "m".into(), sha256: [1; 32], path: file.path().into() };
    let server = Server::with(|c: &mut GatewayConfig| {
        c.api_key = Some("secret".into());
        c.files = vec![shared];
    });
    (server.await, file)
}

async fn get(server: &Server, path: &str, headers: &str) -> Reply {
    server.send("GET", path, headers, b"").await
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_need_no_key_and_may_run_only_scripts_of_this_server() {
    let (server, _file) = with_file(1).await;
    for path in ["/", "/cluster", "/bench", "/join"] {
        let page = server.get(path).await;
        assert_eq!(page.status, 200, "{path}: {page:?}");
        assert!(page.header("content-type").unwrap().starts_with("text/html"), "{page:?}");
        assert!(
            page.header("content-security-policy").unwrap().contains("script-src 'self' 'wasm-unsafe-eval';")
        );
        let tag = page.header("etag").unwrap().to_owned();
        let known = get(&server, path, &format!("if-none-match: {tag}\r\n")).await;
        assert_eq!((known.status, known.body.as_str()), (304, ""), "{path}");
        assert_eq!(server.send("POST", path, "", b"").await.status, 405);
        assert_eq!(get(&server, path, "host: evil.example\r\n").await.status, 403);
    }
    assert_eq!(server.get("/nothing").await.status, 401, "whoever has no key learns nothing else");
    assert_eq!(get(&server, "/nothing", KEY).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_come_whole_or_in_ranges_to_whoever_has_the_key() {
    const BYTES: usize = 700_000;
    let (server, file) = with_file(BYTES).await;
    let path = format!("/weir/v1/files/{NAME}");
    for path in ["/weir/v1/files", &path] {
        assert_eq!(server.get(path).await.status, 401, "{path}");
    }
    let list = get(&server, "/weir/v1/files", KEY).await.json();
    assert_eq!(list["files"][0]["sha256"], NAME);
    assert_eq!(list["files"][0]["size"], BYTES);
    let whole = get(&server, &path, KEY).await;
    assert_eq!((whole.status, whole.body.len()), (200, BYTES));
    assert_eq!(whole.header("content-length"), Some("700000"));
    let check = async |range: &str, status: u16, body: &str, told: &str| {
        let reply = get(&server, &path, &format!("{KEY}range: {range}\r\n")).await;
        assert_eq!((reply.status, reply.body.as_str()), (status, body), "{range}");
        assert_eq!(reply.header("content-range"), Some(told), "{range}");
    };
    check("bytes=0-2", 206, "abc", "bytes 0-2/700000").await;
    check("bytes=26-27", 206, "ab", "bytes 26-27/700000").await;
    check("bytes=699999-", 206, "b", "bytes 699999-699999/700000").await;
    check("bytes=700000-", 416, "", "bytes */700000").await;
    assert_eq!(get(&server, &format!("/weir/v1/files/{}", &NAME[1..]), KEY).await.status, 404);
    assert_eq!(get(&server, "/weir/v1/files/../../etc/passwd", KEY).await.status, 404);
    drop(file);
    assert_eq!(get(&server, &path, KEY).await.status, 404, "it is gone");
}
