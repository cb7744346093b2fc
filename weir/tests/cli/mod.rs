//! The program as people and scripts see it: exit codes, what goes to stdout, what the errors say.
mod canned;

use canned::Canned;
use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A machine of its own: an empty cache, nobody's configuration.
struct Machine {
    folder: tempfile::TempDir,
}

impl Machine {
    fn new() -> Machine {
        Machine { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
        command.args(arguments).current_dir(self.path()).stdin(Stdio::null());
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("WEIR_")
                || name.starts_with("HF_")
                || name.to_ascii_lowercase().ends_with("_proxy")
            {
                command.env_remove(&*name);
            }
        }
        command
            .env("WEIR_CACHE", self.path().join("cache"))
            .env("XDG_CONFIG_HOME", self.path())
            .env("XDG_STATE_HOME", self.path());
        command
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        Ran::of(self.command(arguments).output().unwrap())
    }

    /// With this on standard input.
    fn fed(&self, arguments: &[&str], input: &[u8]) -> Ran {
        let mut command = self.command(arguments);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        Ran::of(child.wait_with_output().unwrap())
    }

    /// A catalog of one small file, `tiny`, from this folder.
    fn catalog(&self) -> String {
        let body = b"GGUF, or so it says";
        std::fs::write(self.path().join("source.gguf"), body).unwrap();
        // SHA-256 of the above
        let sha256 = "3357823570ff5c8482342c885efb3b83ed80202b8e538524a33b64596e410d72";
        let source = self.path().join("source.gguf");
        let text = format!(
            "[[model]]\nname = 'tiny'\nsize = {}\nsha256 = '{sha256}'\n[[model.source]]\nkind = 'file'\npath = '{}'\n",
            body.len(),
            source.display()
        );
        let path = self.path().join("catalog.toml");
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }
}

struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ran {
    fn of(output: Output) -> Ran {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    #[track_caller]
    fn check(&self, code: i32, out: &str, err: &[&str]) {
        assert_eq!((self.code, self.out.as_str()), (Some(code), out), "{}", self.err);
        for part in err {
            assert!(self.err.contains(part), "{:?} lacks {part:?}", self.err);
        }
    }
}

#[test]
fn wrong_command_lines_are_refused_with_2() {
    let machine = Machine::new();
    let check = |arguments: &[&str], says: &str| machine.run(arguments).check(2, "", &[says]);
    check(&[], "Usage");
    check(&["chet"], "chat");
    check(&["chat", "--temperature", "hot", "x"], "not a number");
    check(&["chat", "--temperature=-1", "x"], "0..=100");
    check(&["chat", "--temperature", "NaN", "x"], "0..=100");
    check(&["chat", "--top-p", "0", "x"], "above 0");
    check(&["chat", "--max-tokens", "0", "x"], "max-tokens");
    check(&["chat", "--draft", "small", "--url", "http://127.0.0.1:1", "x"], "--draft");
    check(&["pull"], "NAME");
}

#[test]
fn help_goes_to_stdout_with_examples() {
    let machine = Machine::new();
    for arguments in [&["--help"][..], &["chat", "--help"], &["pull", "--help"], &["models", "--help"]] {
        let ran = machine.run(arguments);
        assert_eq!(ran.code, Some(0));
        assert!(ran.out.contains("Examples:") && ran.err.is_empty(), "{arguments:?}: {}", ran.out);
    }
}

#[test]
fn models_are_listed_for_people_and_for_programs() {
    let machine = Machine::new();
    let ran = machine.run(&["models"]);
    assert!(ran.code == Some(0) && ran.out.contains("SmolLM2-135M-Instruct *"), "{}", ran.out);
    let ran = machine.run(&["models", "--json"]);
    let list: Value = serde_json::from_str(&ran.out).unwrap();
    let models = list["models"].as_array().unwrap();
    assert_eq!(models.iter().filter(|m| m["default"] == true).count(), 1);
    assert!(models.iter().all(|m| m["state"] == "absent" && m["bytes_here"] == 0));
}

#[test]
fn a_model_is_pulled_listed_and_removed() {
    let machine = Machine::new();
    let catalog = machine.catalog();
    let run = |arguments: &[&str]| {
        Ran::of(machine.command(arguments).env("WEIR_CATALOG", &catalog).output().unwrap())
    };
    let path = machine.path().join("cache/models/tiny.gguf");
    for _ in 0..2 {
        run(&["pull", "TINY"]).check(0, &format!("{}\n", path.display()), &[]);
    }
    let list: Value = serde_json::from_str(&run(&["models", "--json"]).out).unwrap();
    assert_eq!(
        (list["models"][0]["name"].as_str(), list["models"][0]["state"].as_str()),
        (Some("tiny"), Some("present"))
    );
    run(&["remove", "tiny"]).check(0, "", &["removed tiny"]);
    run(&["remove", "tiny"]).check(0, "", &["was not on this machine"]);
    assert!(!path.exists());
    run(&["pull", "tinny"]).check(1, "", &["no model is called `tinny`", "tiny"]);
    std::fs::write(machine.path().join("source.gguf"), b"GGUF, or so it lies").unwrap();
    run(&["pull", "tiny"]).check(1, "", &["could not fetch tiny", "SHA-256"]);
    assert!(!path.exists());
}

#[test]
fn configuration_that_makes_no_sense_is_named() {
    let machine = Machine::new();
    machine.run(&["--config", "nowhere.toml", "models"]).check(1, "", &["nowhere.toml"]);
    std::fs::write(machine.path().join("weir.toml"), "htpp = '127.0.0.1:1'").unwrap();
    machine.run(&["models"]).check(1, "", &["htpp", "weir.toml"]);
    std::fs::write(machine.path().join("weir.toml"), "").unwrap();
    let ran = machine.command(&["models"]).env("WEIR_HTTP", "here").output().unwrap();
    Ran::of(ran).check(1, "", &["HTTP", "WEIR_"]);
}

#[test]
fn a_draft_model_goes_with_a_model() {
    let machine = Machine::new();
    machine.run(&["serve", "--model", "null", "--draft", "null", "--draft", "null"]).check(
        1,
        "",
        &["--draft names 2 models for 1"],
    );
    machine.run(&["serve", "--model", "null", "--draft", "null"]).check(1, "", &["both must be files"]);
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let machine = Machine::new();
    let mut child =
        machine.command(&["models", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    Ran::of(child.wait_with_output().unwrap()).check(0, "", &[]);
}

#[test]
fn a_gateway_is_asked_and_its_answer_printed() {
    let machine = Machine::new();
    let server = Canned::answering(&["Hel", "lo"]);
    let arguments = [
        "chat",
        "--url",
        &server.url,
        "--model",
        "m",
        "--system",
        "Be kind",
        "--seed",
        "5",
        "--max-tokens",
        "7",
        "Say",
        "hello",
    ];
    machine.run(&arguments).check(0, "Hello\n", &[]);
    let asked = server.asked();
    assert_eq!(asked["messages"][0]["content"], "Be kind");
    assert_eq!(asked["messages"][1]["content"], "Say hello");
    assert_eq!((asked["seed"].as_u64(), asked["max_tokens"].as_u64()), (Some(5), Some(7)));
    assert!(asked.get("temperature").is_none());
}

#[test]
fn standard_input_is_the_prompt_or_added_to_it() {
    let machine = Machine::new();
    let check = |arguments: &[&str], input: &[u8], prompt: &str| {
        let server = Canned::answering(&["ok"]);
        let all = [&["chat", "--model", "m", "--url", &server.url], arguments].concat();
        machine.fed(&all, input).check(0, "ok\n", &[]);
        assert_eq!(server.asked()["messages"][0]["content"], prompt);
    };
    check(&[], b"a question\n", "a question");
    check(&["Review"], "größe\n".as_bytes(), "Review\n\ngröße");
    check(&["Review"], b"", "Review");
    machine.fed(&["chat", "--url", "http://127.0.0.1:1"], b" \n").check(1, "", &["nothing to ask"]);
    machine.fed(&["chat", "--url", "http://127.0.0.1:1"], b"\xff\xfe").check(1, "", &["not text"]);
}

#[test]
fn a_gateway_that_fails_is_an_error() {
    let machine = Machine::new();
    machine.run(&["chat", "--url", "http://127.0.0.1:1", "hi"]).check(
        1,
        "",
        &["could not reach 127.0.0.1:1"],
    );
    machine.run(&["chat", "--url", "gopher://x", "hi"]).check(1, "", &["gopher://x"]);
    let server = Canned::breaking_off("Hel");
    machine.run(&["chat", "--url", &server.url, "--model", "m", "hi"]).check(1, "Hel\n", &["broke"]);
}

/// Waits until the child is gone; its output.
fn finish(mut child: Child) -> Ran {
    let deadline = Instant::now() + Duration::from_secs(20);
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "still running");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ran::of(child.wait_with_output().unwrap())
}

#[cfg(unix)]
#[test]
fn an_interrupted_answer_ends_with_130() {
    let machine = Machine::new();
    let server = Canned::endless("la ");
    let mut command = machine.command(&["chat", "--url", &server.url, "--model", "m", "sing"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    server.wait_until_asked();
    std::thread::sleep(Duration::from_millis(300));
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let ran = finish(child);
    assert_eq!(ran.code, Some(130), "{}", ran.err);
    assert!(ran.out.starts_with("la la ") && ran.out.ends_with('\n'), "{:?}", ran.out);
}

#[test]
fn policies_are_checked_explained_and_tested() {
    let machine = Machine::new();
    machine.run(&["policy", "check", "spill-when-busy"]).check(0, "", &[]);
    let path = machine.path().join("house.toml");
    std::fs::write(&path, "[[require]]\nthat = \"node.trsut == 'own'\"\n").unwrap();
    let wrong = ["house.toml:2:14: ", "did you mean `node.trust`?", "has a mistake"];
    machine.run(&["policy", "check", "house.toml"]).check(1, "", &wrong);
    machine.run(&["serve", "--policy", "house.toml", "--model", "null"]).check(1, "", &wrong[..2]);
    machine.run(&["serve", "--policy", "hous.toml"]).check(1, "", &["there is no policy file", "cheapest"]);
    let told = machine.run(&["policy", "check", "house.toml", "--json"]);
    let told: Value = serde_json::from_str(&told.out).unwrap();
    assert_eq!((&told["errors"][0]["line"], &told["errors"][0]["column"]), (&2.into(), &14.into()));

    let shown = machine.run(&["policy", "show", "private-stays-home"]);
    std::fs::write(&path, &shown.out).unwrap();
    let pool = "[[node]]\nname = 'desk'\nmodels = [{ name = 'm' }]\n\
                [[node]]\nname = 'tab'\ntrust = 'guest'\nmodels = [{ name = 'm', token_ms = 1 }]\n";
    std::fs::write(machine.path().join("pool.toml"), pool).unwrap();
    let request = br#"{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "weir": {"tags": {"private": ""}}}"#;
    let arguments = ["policy", "explain", "house.toml", "--request", "-", "--pool", "pool.toml"];
    let told = machine.fed(&arguments, request);
    assert!(
        told.out.contains("It goes to desk.") && told.out.contains("dropped"),
        "{}{}",
        told.out,
        told.err
    );
    let told = machine.fed(&[&arguments[..], &["--json"]].concat(), request);
    let told: Value = serde_json::from_str(&told.out).unwrap();
    assert_eq!(told["outcome"]["goes"], "desk");
    assert_eq!(told["nodes"][1]["rule"], "private");

    let case = |expect: &str| {
        format!("policy = 'house.toml'\n{pool}[[case]]\nrequest = {{ model = 'm' }}\nexpect = '{expect}'\n")
    };
    std::fs::write(machine.path().join("right.toml"), case("tab")).unwrap();
    machine.run(&["policy", "test", "right.toml"]).check(0, "", &["1 cases go as expected"]);
    std::fs::write(machine.path().join("wrong.toml"), case("desk")).unwrap();
    let told = machine.run(&["policy", "test", "wrong.toml"]);
    assert!(told.code == Some(1) && told.out.contains("expected `desk`, and came to `tab`"), "{}", told.out);
    let schema: Value = serde_json::from_str(&machine.run(&["policy", "schema"]).out).unwrap();
    assert!(schema["properties"]["require"].is_object());
}
