//! The official clients of OpenAI and Anthropic, unchanged, against a real `weir serve`.
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use weir_tests::{Serve, model, skip, target};

const KEY: &str = "sdk-test-key";

#[test]
fn python() {
    let Some(python) = python_client() else { return };
    each_model(|address, name| {
        for script in ["python/check.py", "python/messages.py"] {
            run(client(Command::new(&python).arg(sources().join(script)), address, name));
        }
    });
}

#[test]
fn javascript() {
    let Some(folder) = node_client() else { return };
    each_model(|address, name| {
        for script in ["check.mjs", "messages.mjs"] {
            run(client(Command::new("node").arg(script).current_dir(&folder), address, name));
        }
    });
}

/// LangChain and Vercel's AI SDK: large, so only `cargo xtask test --full` installs them.
#[test]
fn frameworks() {
    if std::env::var_os("WEIR_TEST_FULL").is_none() {
        eprintln!("SKIPPED: frameworks over the official clients: cargo xtask test --full runs them");
        return;
    }
    let frameworks = sources().join("frameworks");
    let (Some(python), Some(folder)) = (
        python_environment("frameworks-python", &frameworks.join("requirements.txt")),
        node_environment("frameworks-node", &frameworks, &["ai.mjs"]),
    ) else {
        return;
    };
    each_model(|address, name| {
        run(client(Command::new(&python).arg(frameworks.join("langchain_check.py")), address, name));
        run(client(Command::new("node").arg("ai.mjs").current_dir(&folder), address, name));
    });
}

/// Calls `check` with the address of a gateway and the name of a model there: the null one, and a real one.
fn each_model(check: impl Fn(&str, &str)) {
    let real = model("smollm2.gguf");
    for path in [Some(PathBuf::from("null")), real].into_iter().flatten() {
        let serve = Serve::start(&["--model", path.to_str().expect("it is UTF-8")], &[("WEIR_API_KEY", KEY)]);
        let name = path.file_stem().and_then(|s| s.to_str()).expect("it has a name");
        check(&format!("http://{}", serve.address), name);
    }
}

fn client<'a>(command: &'a mut Command, address: &str, name: &str) -> &'a mut Command {
    command.env("OPENAI_BASE_URL", format!("{address}/v1")).env("OPENAI_API_KEY", KEY);
    command.env("ANTHROPIC_BASE_URL", address).env("ANTHROPIC_API_KEY", KEY).env("MODEL", name)
}

pub(super) fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    println!("{}", text(&output.stdout));
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("sdk")
}

/// The interpreter of an environment that has the pinned clients.
fn python_client() -> Option<PathBuf> {
    python_environment("python", &sources().join("python/requirements.txt"))
}

/// The interpreter of an environment that has what a file lists.
fn python_environment(name: &str, requirements: &Path) -> Option<PathBuf> {
    if Command::new("python3")
        .args(["-c", "import venv, ensurepip"])
        .output()
        .is_ok_and(|o| o.status.success())
    {
        let folder = prepared(name, requirements, |folder| {
            run(Command::new("python3").args(["-m", "venv"]).arg(folder));
            let pip = folder.join("bin/pip");
            run(Command::new(pip).args(["install", "--quiet", "--requirement"]).arg(requirements));
        });
        return Some(folder.join("bin/python"));
    }
    skip("python3 with venv is missing: apt-get install -y python3 python3-venv");
    None
}

/// A folder with the checks and the pinned clients.
fn node_client() -> Option<PathBuf> {
    node_environment("node", &sources().join("node"), &["check.mjs", "messages.mjs"])
}

/// A folder with these scripts of `from`, and with what its package names.
fn node_environment(name: &str, from: &Path, scripts: &[&str]) -> Option<PathBuf> {
    if Command::new("npm").arg("--version").output().is_ok_and(|o| o.status.success()) {
        let copy = |name: &str, folder: &Path| {
            std::fs::copy(from.join(name), folder.join(name)).expect("a copy");
        };
        let folder = prepared(name, &from.join("package-lock.json"), |folder| {
            std::fs::create_dir_all(folder).expect("a folder");
            copy("package.json", folder);
            copy("package-lock.json", folder);
            run(Command::new("npm")
                .args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"])
                .current_dir(folder));
        });
        scripts.iter().for_each(|script| copy(script, &folder));
        return Some(folder);
    }
    skip("npm is missing: apt-get install -y nodejs npm");
    None
}

/// A folder that `prepare` has filled, once for each content of `pins`.
pub(super) fn prepared(name: &str, pins: &Path, prepare: impl Fn(&Path)) -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock();
    let pins = std::fs::read(pins).expect("the pins are in the repository");
    let folder = target().join("sdk").join(name);
    let done = folder.join("pins");
    if std::fs::read(&done).ok().as_ref() != Some(&pins) {
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(target().join("sdk")).expect("a folder");
        prepare(&folder);
        std::fs::write(done, pins).expect("a note that it is done");
    }
    folder
}
