//! `weir bench` beside an OpenAI-compatible server: ours, so that both sides are known.
use serde_json::Value;
use std::process::{Command, Stdio};
use std::time::Duration;
use weir_tests::{Serve, weir};

fn bench(arguments: &[&str]) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let common = ["bench", "--json", "--runs", "2", "--prompt-tokens", "20", "--output-tokens", "10"];
    let ran = weir(folder.path()).args(common).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{said}");
    serde_json::from_slice(&ran.stdout).unwrap()
}

/// The peer's step takes five times ours.
#[test]
fn a_peer_is_measured_in_turns_with_us() {
    let peer = Serve::start(&["--model", "null:step_us=20000"], &[]);
    let url = format!("http://{}", peer.address);
    let report = bench(&["--model", "null:step_us=4000", "--vs", &url, "--streams", "2"]);
    let result = &report["models"][0];
    assert_eq!(result["model"], "null");
    for side in ["weir", "peer"] {
        for figure in ["ttft_ms", "prefill_tok_s", "decode_tok_s", "total_tok_s"] {
            let value = result[side][figure].as_f64();
            assert!(value.is_some_and(|v| v > 0.0), "{side} {figure}: {value:?}");
        }
    }
    let pace = |side: &str| result[side]["decode_tok_s"].as_f64().unwrap();
    assert!(pace("peer") <= 51.0, "a step of 20 ms: {report}");
    assert!(pace("weir") <= 255.0, "a step of 4 ms: {report}");
    let ratio = result["decode_ratio"].as_f64().unwrap();
    assert!(ratio > 1.0, "{report}");
}

#[test]
fn a_peer_that_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["bench", "--model", "null", "--vs", "http://127.0.0.1:1", "--runs", "1"];
    let ran = weir(folder.path()).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(1), "{said}");
    assert!(said.contains("127.0.0.1:1"), "{said}");
}

/// Wherever a command is, Ctrl-C ends it with a word and its exit code.
#[test]
#[cfg(unix)]
fn an_interrupt_in_the_middle() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["bench", "--model", "null:step_us=200000", "--output-tokens", "1000"];
    let mut command = weir(folder.path());
    let bench = command.args(arguments).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let id = bench.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let ended = bench.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(130), "{said}");
    assert!(said.contains("interrupted") && !said.contains("panicked"), "{said}");
}
