//! Running the real program.
use crate::{Connection, Reply};
use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The folder that cargo builds into.
pub fn target() -> PathBuf {
    // target/PROFILE/deps/TEST
    let test = std::env::current_exe().expect("a process knows its file");
    test.ancestors().nth(3).expect("cargo puts tests three levels deep").to_owned()
}

/// The program, built in the tests' profile.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build.args(["build", "--quiet", "--package", "weir", "--bin", "weir"]);
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        let status = build.current_dir(env!("CARGO_MANIFEST_DIR")).status().expect("cargo runs");
        assert!(status.success(), "the program must build");
        let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
        target().join(profile).join(format!("weir{}", std::env::consts::EXE_SUFFIX))
    })
}

/// The program with nothing of this machine's configuration, in `folder`.
pub fn weir(folder: &Path) -> Command {
    let mut command = Command::new(program());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("WEIR_") {
            command.env_remove(name);
        }
    }
    command
        .env("XDG_CONFIG_HOME", folder)
        .env("XDG_STATE_HOME", folder)
        .current_dir(folder)
        .stdin(Stdio::null());
    command
}

/// A running `weir serve`; killed when dropped.
pub struct Serve {
    /// Where its gateway listens.
    pub address: SocketAddr,
    child: Child,
    folder: TempDir,
}

impl Serve {
    /// Starts one with `arguments` on a free port, and waits until it is ready.
    ///
    /// # Panics
    /// If it ends, or isn't ready within two minutes.
    pub fn start(arguments: &[&str], environment: &[(&str, &str)]) -> Serve {
        let mut serve = Serve::spawn(free_address(), arguments, environment);
        serve.wait_for("/readyz");
        serve
    }

    /// Starts one that answers, whether it has nodes or not.
    ///
    /// # Panics
    /// If it ends, or doesn't answer within two minutes.
    pub fn awake(address: SocketAddr, arguments: &[&str]) -> Serve {
        Serve::awake_with(address, arguments, &[])
    }

    /// The same in this environment.
    ///
    /// # Panics
    /// As [`Serve::awake`] does.
    pub fn awake_with(address: SocketAddr, arguments: &[&str], environment: &[(&str, &str)]) -> Serve {
        let mut serve = Serve::spawn(address, arguments, environment);
        serve.wait_for("/healthz");
        serve
    }

    fn wait_for(&mut self, path: &str) {
        let end = Instant::now() + Duration::from_secs(120);
        while self.get(path).map_or(0, |reply| reply.status) != 200 {
            let status = self.child.try_wait().expect("a child can be waited for");
            assert!(status.is_none(), "weir serve ended with {status:?}: {}", self.stderr());
            assert!(Instant::now() < end, "weir serve doesn't say 200 at {path}: {}", self.stderr());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts one at `address`, ready or not.
    pub fn spawn(address: SocketAddr, arguments: &[&str], environment: &[(&str, &str)]) -> Serve {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = |name| File::create(folder.path().join(name)).expect("a file in it");
        let child = weir(folder.path())
            .args(["serve", "--http", &address.to_string()])
            .args(arguments)
            .envs(environment.iter().copied())
            .stdout(file("stdout"))
            .stderr(file("stderr"))
            .spawn()
            .expect("the program starts");
        Serve { address, child, folder }
    }

    /// Waits until it has said where it listens.
    ///
    /// # Panics
    /// If it ends, or doesn't say so within a minute.
    pub fn wait_for_address(&mut self) {
        let end = Instant::now() + Duration::from_secs(60);
        while !std::fs::read_to_string(self.folder.path().join("stdout"))
            .is_ok_and(|said| said.ends_with('\n'))
        {
            let status = self.child.try_wait().expect("a child can be waited for");
            assert!(status.is_none() && Instant::now() < end, "{status:?}: {}", self.stderr());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What it has said so far.
    pub fn stderr(&self) -> String {
        stderr(&self.folder)
    }

    /// `GET path`.
    pub fn get(&self, path: &str) -> io::Result<Reply> {
        Connection::open(self.address, "GET", path, "")?.reply()
    }

    /// `POST path`.
    pub fn post(&self, path: &str, body: &str) -> io::Result<Reply> {
        Connection::open(self.address, "POST", path, body)?.reply()
    }

    /// `POST path` with further headers, each ended by `\r\n`; a host among them replaces ours.
    pub fn post_as(&self, path: &str, body: &str, headers: &str) -> io::Result<Reply> {
        Connection::open_as(self.address, "POST", path, body, headers)?.reply()
    }

    /// Sends a signal: `INT`, `TERM`.
    pub fn signal(&self, name: &str) {
        signal(&self.child, name);
    }

    /// Memory that it has now; 0 where the system doesn't tell.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
        line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it doesn't come within `limit`.
    pub fn ended(&mut self, limit: Duration) -> ExitStatus {
        ended(&mut self.child, limit, &self.folder)
    }
}

/// Any command of the program, in a network namespace; killed when dropped.
pub struct Program {
    child: Child,
    folder: TempDir,
}

impl Program {
    /// Starts `weir ARGUMENTS` in the namespace of that name.
    pub fn within(namespace: &str, arguments: &[&str]) -> Program {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = |name| File::create(folder.path().join(name)).expect("a file in it");
        let mut command = Command::new("ip");
        // It becomes the program, so that signals reach that.
        command.args(["netns", "exec", namespace]).arg(program()).args(arguments);
        let child = command
            .env("XDG_CONFIG_HOME", folder.path())
            .env("XDG_STATE_HOME", folder.path())
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(file("stdout"))
            .stderr(file("stderr"))
            .spawn()
            .expect("the program starts");
        Program { child, folder }
    }

    /// What it has written so far.
    pub fn stdout(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("stdout")).unwrap_or_default()
    }

    /// What it has said so far.
    pub fn stderr(&self) -> String {
        stderr(&self.folder)
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it doesn't come within `limit`.
    pub fn ended(&mut self, limit: Duration) -> ExitStatus {
        ended(&mut self.child, limit, &self.folder)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A running `weir join`; killed when dropped.
pub struct Node {
    child: Child,
    folder: TempDir,
}

impl Node {
    /// Starts one; its key is kept in a folder of its own.
    pub fn join(name: &str, link: &str, model: &str) -> Node {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Node::start(folder, &[link, "--name", name, "--model", model], &[])
    }

    /// Starts one with these flags in this environment.
    pub fn join_with(name: &str, link: &str, flags: &[&str], environment: &[(&str, &str)]) -> Node {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Node::start(folder, &[&[link, "--name", name], flags].concat(), environment)
    }

    /// Starts it again after its end, with the key that it had.
    pub fn again(self, name: &str, model: &str) -> Node {
        Node::start(self.stop(), &["--name", name, "--model", model], &[])
    }

    fn start(folder: TempDir, arguments: &[&str], environment: &[(&str, &str)]) -> Node {
        let file = |name| File::create(folder.path().join(name)).expect("a file in it");
        let child = weir(folder.path())
            .arg("join")
            .args(arguments)
            .arg("--state")
            .arg(folder.path().join("state"))
            .envs(environment.iter().copied())
            .stdout(file("stdout"))
            .stderr(file("stderr"))
            .spawn()
            .expect("the program starts");
        Node { child, folder }
    }

    /// Kills it outright.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn stop(mut self) -> TempDir {
        self.kill();
        std::mem::replace(&mut self.folder, tempfile::tempdir().expect("a temporary folder"))
    }

    /// What it has said so far.
    pub fn stderr(&self) -> String {
        stderr(&self.folder)
    }

    /// Sends a signal: `INT`, `TERM`, `STOP`, `CONT`.
    pub fn signal(&self, name: &str) {
        signal(&self.child, name);
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it doesn't come within `limit`.
    pub fn ended(&mut self, limit: Duration) -> ExitStatus {
        ended(&mut self.child, limit, &self.folder)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status();
    assert!(status.is_ok_and(|s| s.success()), "kill -{name}");
}

fn stderr(folder: &TempDir) -> String {
    std::fs::read_to_string(folder.path().join("stderr")).unwrap_or_default()
}

fn ended(child: &mut Child, limit: Duration, folder: &TempDir) -> ExitStatus {
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return status;
        }
        assert!(Instant::now() < end, "it runs on after {limit:?}: {}", stderr(folder));
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A loopback address whose port is free, for TCP and for UDP.
pub fn free_address() -> SocketAddr {
    loop {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it has an address");
        if UdpSocket::bind(address).is_ok() {
            return address;
        }
    }
}
