//! The gateway off loopback: TLS, a key, and nobody else's pages. What checks it is curl and OpenSSL.
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use weir_tests::{Serve, free_address, weir};

const KEY: (&str, &str) = ("WEIR_API_KEY", "secret");
const BEARER: &str = "authorization: Bearer secret";

/// A gateway that other machines can reach, with its state.
struct Open {
    serve: Serve,
    state: tempfile::TempDir,
    port: u16,
}

impl Open {
    fn start(flags: &[&str]) -> Open {
        let (state, port) = (tempfile::tempdir().unwrap(), free_address().port());
        let mut arguments = vec!["--model", "null", "--state", state.path().to_str().unwrap()];
        arguments.extend(flags);
        let mut serve = Serve::spawn(([0, 0, 0, 0], port).into(), &arguments, &[KEY]);
        serve.wait_for_address();
        Open { serve, state, port }
    }

    fn authority(&self) -> PathBuf {
        self.state.path().join("authority.pem")
    }

    fn curl(&self, host: &str, path: &str, flags: &[&str]) -> (i32, String, String) {
        curl(&self.authority(), &format!("https://{host}:{}{path}", self.port), flags)
    }
}

/// Exit code, status and body.
fn curl(authority: &Path, url: &str, flags: &[&str]) -> (i32, String, String) {
    let mut command = Command::new("curl");
    command
        .args(["--silent", "--max-time", "20", "--write-out", "\n%{http_code}", "--cacert"])
        .arg(authority);
    let out = command.args(flags).arg(url).output().expect("curl is installed");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let (body, status) = text.rsplit_once('\n').unwrap_or(("", &text));
    (out.status.code().unwrap_or(-1), status.to_owned(), body.to_owned())
}

#[test]
fn a_gateway_off_loopback_speaks_tls_by_a_local_authority() {
    let open = Open::start(&["--listen", &free_address().to_string()]);
    for host in ["127.0.0.1", "localhost"] {
        let (code, status, body) = open.curl(host, "/v1/models", &["--header", BEARER]);
        assert_eq!((code, status.as_str()), (0, "200"), "{host}: {body}");
        assert!(body.contains("\"null\""), "{body}");
    }
    let check = |flags: &[&str], expected: &str, says: &str| {
        let (code, status, body) = open.curl("127.0.0.1", "/v1/models", flags);
        assert_eq!((code, status.as_str()), (0, expected), "{flags:?}: {body}");
        assert!(body.contains(says), "{flags:?}: {body}");
    };
    check(&[], "401", "missing_api_key");
    check(&["--header", "authorization: Bearer guess"], "401", "invalid_api_key");
    check(&["--header", BEARER, "--header", "host: evil.example"], "403", "host_not_allowed");
    check(&["--header", BEARER, "--header", "origin: https://evil.example"], "403", "origin_not_allowed");
    let own = format!("origin: https://127.0.0.1:{}", open.port);
    check(&["--header", BEARER, "--header", &own], "200", "null");
    let (code, _, _) = curl(Path::new("/etc/hostname"), &format!("https://127.0.0.1:{}/", open.port), &[]);
    assert!(code == 60 || code == 77, "an authority that nobody trusts counts for nothing: {code}");
    let (_, status, body) =
        curl(&open.authority(), &format!("http://127.0.0.1:{}/v1/models", open.port), &[]);
    assert!(status == "400" && body.contains("https://"), "{status} {body}");
    check_openssl(&open);
    check_own_programs(&open);
    assert!(!open.serve.stderr().contains("panicked"), "{}", open.serve.stderr());
}

/// OpenSSL checks the whole chain, and the authority's constraints.
fn check_openssl(open: &Open) {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-verify_return_error", "-verify_ip", "127.0.0.1", "-CAfile"]);
    command.arg(open.authority()).args(["-connect", &format!("127.0.0.1:{}", open.port)]);
    let out = command.stdin(std::process::Stdio::null()).output().expect("openssl is installed");
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && said.contains("Verify return code: 0 (ok)"), "{said}");
    assert!(said.contains("TLSv1.3"), "{said}");
}

/// `weir nodes` knows the key from the state folder; `weir chat` trusts what the system trusts.
fn check_own_programs(open: &Open) {
    let folder = tempfile::tempdir().unwrap();
    let nodes = weir(folder.path()).args(["nodes", "--state"]).arg(open.state.path()).output().unwrap();
    assert!(nodes.status.success(), "{}", String::from_utf8_lossy(&nodes.stderr));
    assert!(String::from_utf8_lossy(&nodes.stdout).contains("local"), "{nodes:?}");
    let mut chat = weir(folder.path());
    chat.args(["chat", "--url", &format!("https://127.0.0.1:{}", open.port), "--key", "secret"]);
    chat.args(["--model", "null", "--max-tokens", "3", "Hello"]);
    let untrusted = chat.output().unwrap();
    assert!(!untrusted.status.success(), "nobody has told it to trust that");
    let trusted = chat.env("SSL_CERT_FILE", open.authority()).output().unwrap();
    assert!(trusted.status.success(), "{}", String::from_utf8_lossy(&trusted.stderr));
    let trust = weir(folder.path()).args(["trust", "--state"]).arg(open.state.path()).output().unwrap();
    assert!(trust.status.success(), "{trust:?}");
    let pem =
        weir(folder.path()).args(["trust", "--pem", "--state"]).arg(open.state.path()).output().unwrap();
    assert_eq!(pem.stdout, std::fs::read(open.authority()).unwrap());
}

#[test]
fn pages_on_the_list_may_call() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("weir.toml");
    std::fs::write(&config, "allowed_origins = ['https://chat.example']\nallowed_hosts = ['pool.example']")
        .unwrap();
    let open = Open::start(&["--config", config.to_str().unwrap()]);
    let origin = ["--header", "origin: https://chat.example", "--include"];
    let (_, status, body) =
        open.curl("127.0.0.1", "/v1/models", &[&origin[..], &["--header", BEARER]].concat());
    assert!(status == "200" && body.contains("access-control-allow-origin: https://chat.example"), "{body}");
    let preflight = ["--request", "OPTIONS", "--header", "access-control-request-headers: authorization"];
    let (_, status, body) =
        open.curl("127.0.0.1", "/v1/chat/completions", &[&origin[..], &preflight].concat());
    assert!(
        status == "204" && body.contains("access-control-allow-headers: authorization"),
        "{status} {body}"
    );
    let (_, status, _) =
        open.curl("127.0.0.1", "/v1/models", &["--header", "host: pool.example", "--header", BEARER]);
    assert_eq!(status, "200");
}

#[test]
fn own_certificates() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for name in ["own", "other"] {
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=own"]);
        command.args(["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", &file(&format!("{name}.key"))]);
        let made =
            command.args(["-out", &file(&format!("{name}.pem"))]).output().expect("openssl is installed");
        assert!(made.status.success(), "{made:?}");
    }
    let (certificate, key) = (file("own.pem"), file("own.key"));
    let open = Open::start(&["--tls-cert", &certificate, "--tls-key", &key]);
    let url = format!("https://127.0.0.1:{}/v1/models", open.port);
    let (code, status, body) = curl(Path::new(&certificate), &url, &["--header", BEARER]);
    assert_eq!((code, status.as_str()), (0, "200"), "{body}");
    assert!(!open.authority().exists(), "no local authority is made");
    let refused = |flags: [&str; 4], word: &str| {
        let mut serve = Serve::spawn(free_address(), &[&["--model", "null"], &flags[..]].concat(), &[KEY]);
        assert_eq!(serve.ended(Duration::from_secs(20)).code(), Some(1));
        assert!(serve.stderr().contains(word) && !serve.stderr().contains("panicked"), "{}", serve.stderr());
    };
    refused(["--tls-cert", &certificate, "--tls-key", &file("other.key")], "can't be used");
    refused(["--tls-cert", &certificate, "--tls-key", "/nowhere"], "/nowhere");
    refused(["--tls-cert", &key, "--tls-key", &key], "can't be used");
}

/// Who connects and says nothing, or not TLS, takes no place for long and no place of others.
#[test]
fn handshakes_that_never_end() {
    let open = Open::start(&[]);
    let silent: Vec<_> =
        (0..200).map(|_| std::net::TcpStream::connect(("127.0.0.1", open.port)).unwrap()).collect();
    let began = Instant::now();
    let (_, status, _) = open.curl("127.0.0.1", "/healthz", &[]);
    assert_eq!(status, "200");
    assert!(began.elapsed() < Duration::from_secs(5));
    drop(silent);
}
