//! Strangers who want no good: refused, logged once, and nothing else is disturbed.
use crate::cluster::{House, ask};
use quinn::crypto::rustls::QuicClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};
use weir_tests::{Node, Serve};

const HALF_OPEN: usize = 10_000;

/// A client that trusts everybody, and may say anything.
#[derive(Debug)]
struct Naive;

impl ServerCertVerifier for Naive {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519, SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

fn client(alpn: &[u8]) -> quinn::ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider);
    let mut tls = tls
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Naive))
        .with_no_client_auth();
    tls.alpn_protocols = vec![alpn.to_vec()];
    quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()))
}

fn within<F: Future>(work: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(120), work).await.expect("in time") })
}

/// Says `bytes` on the control stream; returns why the scheduler closes the connection.
async fn told(endpoint: &quinn::Endpoint, to: SocketAddr, bytes: &[u8]) -> String {
    let connection = endpoint.connect_with(client(b"weir/1"), to, "weir").unwrap().await.unwrap();
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    send.write_all(bytes).await.unwrap();
    connection.closed().await.to_string()
}

#[test]
fn what_is_no_frame_is_refused_and_logged_once() {
    let house = House::open();
    let _good = Node::join("good", &house.link(&[]), "null");
    house.wait_for(&[("good", "connected")]);
    let header = |kind: u8, length: u32| {
        [b"WEIR\x01\x00".as_slice(), &[kind, 0, 0, 0, 0, 0], &length.to_le_bytes()].concat()
    };
    let malformed = [header(1, 7), b"{\"vers\"".to_vec()].concat();
    let version = [b"WEIR\x63\x00\x03\x00".as_slice(), &[0; 8]].concat();
    let words: [(&[u8], &str); 5] = [
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", "does not begin with WEIR"),
        (&header(5, 8 << 20 | 1), "longer than allowed"),
        (&header(1, 1 << 20), "longer than allowed"),
        (&malformed, "malformed Hello"),
        (&version, "version 99"),
    ];
    within(async {
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        for (bytes, why) in words.into_iter().cycle().take(2 * words.len()) {
            let said = told(&endpoint, house.listen, bytes).await;
            assert!(said.contains(why), "{said:?} should say {why:?}");
        }
    });
    let logged = house.serve().stderr();
    assert_eq!(logged.matches("turned away").count(), 1, "{logged}");
    assert_eq!(house.complete(&ask("x", 5))["usage"]["completion_tokens"], 5);
    house.wait_for(&[("good", "connected")]);
}

/// First datagrams of handshakes that nobody goes on with, each of a connection of its own.
fn first_datagrams(count: usize, to: SocketAddr) -> Vec<Vec<u8>> {
    let mut endpoint = quinn_proto::Endpoint::new(Arc::default(), None, true, None);
    let config = client(b"weir/1");
    let first = |_| {
        let (_, mut connection) = endpoint.connect(Instant::now(), config.clone(), to, "weir").unwrap();
        let mut datagram = Vec::new();
        let sent = connection.poll_transmit(Instant::now(), 1, &mut datagram);
        assert!(sent.is_some(), "a client speaks first");
        datagram
    };
    (0..count).map(first).collect()
}

#[test]
fn ten_thousand_half_open_connections_keep_nobody_out() {
    let house = House::open();
    let link = house.link(&["--uses", "2"]);
    let _good = Node::join("good", &link, "null");
    house.wait_for(&[("good", "connected")]);
    let datagrams = first_datagrams(HALF_OPEN, house.listen);
    let before = house.serve().resident_bytes();
    let sockets: Vec<UdpSocket> = (0..20).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    let began = Instant::now();
    for (n, datagram) in datagrams.iter().enumerate() {
        sockets[n % sockets.len()].send_to(datagram, house.listen).unwrap();
        if n % 50 == 0 {
            // No faster than the system's buffer is emptied, or they would be lost before they can do harm.
            std::thread::sleep(Duration::from_millis(10));
        }
        if n == HALF_OPEN / 2 {
            assert_eq!(house.complete(&ask("x", 5))["usage"]["completion_tokens"], 5);
        }
    }
    let sent = began.elapsed();
    let began = Instant::now();
    let _late = Node::join("late", &link, "null");
    house.wait_for(&[("good", "connected"), ("late", "connected")]);
    println!("{HALF_OPEN} sent in {sent:?}, then a node was in after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(8), "before the half-open ones are given up");
    let answered: usize = sockets.iter().map(datagrams_waiting).sum();
    assert!(answered > HALF_OPEN / 20, "the scheduler saw few of them: {answered} answers");
    let grown = house.serve().resident_bytes().saturating_sub(before);
    println!("{answered} answers; memory grew by {} KiB", grown >> 10);
    assert!(grown < 32 << 20, "memory grew by {grown} bytes");
    assert_eq!(house.complete(&ask("x", 5))["usage"]["completion_tokens"], 5);
}

fn datagrams_waiting(socket: &UdpSocket) -> usize {
    socket.set_nonblocking(true).unwrap();
    let mut datagram = [0; 2000];
    std::iter::from_fn(|| socket.recv(&mut datagram).ok()).count()
}

/// A web page that a browser shows on this very machine.
#[test]
fn a_page_of_another_origin_gets_nothing() {
    let serve = Serve::start(&["--model", "null"], &[]);
    let body = r#"{"model":"null","prompt":"x","max_tokens":1}"#;
    for _ in 0..3 {
        for path in ["/v1/completions", "/weir/v1/links"] {
            let reply = serve.post_as(path, body, "origin: https://evil.example\r\n").unwrap();
            assert_eq!(
                (reply.status, &reply.json()["error"]["code"]),
                (403, &"origin_not_allowed".into()),
                "{path}"
            );
            let rebound = serve.post_as(path, body, "host: evil.example\r\n").unwrap();
            assert_eq!((rebound.status, &rebound.json()["error"]["code"]), (403, &"host_not_allowed".into()));
        }
    }
    let logged = serve.stderr();
    assert_eq!(logged.matches("origin_not_allowed").count(), 1, "{logged}");
    assert_eq!(logged.matches("host_not_allowed").count(), 1, "{logged}");
    assert!(logged.contains("https://evil.example"), "{logged}");
    assert_eq!(serve.post("/v1/completions", body).unwrap().status, 200);
}

/// A browser's handshake, and then not a word: no session is ever asked for.
#[test]
fn who_comes_as_a_browser_and_asks_for_no_session_is_let_go() {
    let house = House::open();
    let link = house.link(&["--uses", "2"]);
    let _good = Node::join("good", &link, "null");
    house.wait_for(&[("good", "connected")]);
    let _late = within(async {
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let mut silent = Vec::new();
        for _ in 0..50 {
            let connecting = endpoint.connect_with(client(b"h3"), house.listen, "localhost").unwrap();
            silent.push(connecting.await.unwrap());
        }
        // Meanwhile everything goes on, for new ones too.
        let (began, house) = (Instant::now(), &house);
        let late = tokio::task::block_in_place(move || {
            let late = Node::join("late", &link, "null");
            house.wait_for(&[("good", "connected"), ("late", "connected")]);
            assert_eq!(house.complete(&ask("x", 5))["usage"]["completion_tokens"], 5);
            late
        });
        for connection in silent {
            let closed = tokio::time::timeout(Duration::from_secs(15), connection.closed()).await;
            closed.expect("it is let go");
        }
        println!("50 silent ones were let go after {:?}", began.elapsed());
        late
    });
    let logged = house.serve().stderr();
    assert!(logged.matches("turned away").count() <= 1, "{logged}");
    house.wait_for(&[("good", "connected"), ("late", "connected")]);
}

/// A guest whose tokens no model has computed: our own node says so, and the guest is cut off for good. One that is honest
/// stays.
#[test]
fn a_guest_that_makes_tokens_up_is_found_out_and_stays_out() {
    const TRUE: &str = "null:vocab=1000";
    let mut house = House::open();
    let _own = Node::join("own", &house.link(&[]), TRUE);
    house.wait_for(&[("own", "connected")]);
    let guests = house.link(&["--guest", "--uses", "2"]);
    let _honest = Node::join("honest", &guests, TRUE);
    // The same model by its name and its hash, and another by what it says.
    let mut liar = Node::join("liar", &guests, "null:vocab=900");
    house.wait_for(&[("own", "connected"), ("honest", "connected"), ("liar", "connected")]);
    let (end, mut asked) = (Instant::now() + Duration::from_secs(60), 0);
    while house.nodes().iter().any(|node| node["name"] == "liar" && node["state"] == "connected") {
        assert!(Instant::now() < end, "nobody noticed in {asked} answers");
        std::thread::scope(|scope| {
            for n in 0..12 {
                let (house, prompt) = (&house, format!("question {}", asked + n));
                scope.spawn(move || house.complete(&ask(&prompt, 12)));
            }
        });
        asked += 12;
    }
    println!("it took {asked} answers");
    assert_eq!(liar.ended(Duration::from_secs(20)).code(), Some(1));
    assert!(liar.stderr().contains("too unlikely"), "{}", liar.stderr());
    let calm = [("own", "connected"), ("honest", "connected"), ("liar", "refuted")];
    house.wait_for(&calm);
    // Whoever starts the scheduler again finds it noted.
    house.restart();
    house.wait_for(&calm);
    let mut liar = liar.again("liar", "null:vocab=900");
    assert_eq!(liar.ended(Duration::from_secs(20)).code(), Some(1));
    assert!(liar.stderr().contains("too unlikely"), "{}", liar.stderr());
    house.wait_for(&calm);
}
