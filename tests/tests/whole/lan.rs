//! `weir join --lan`: two machines, which are network namespaces here, find each other and compare a code.
use std::process::Command;
use std::time::{Duration, Instant};
use weir_tests::{Program, skip};

/// Two namespaces with a wire between them; gone when dropped.
struct Network {
    names: [String; 2],
}

impl Network {
    /// None where this may not be had: not on Linux, not as root.
    fn new() -> Option<Network> {
        let id = std::process::id();
        let network = Network { names: [format!("weir-a{id}"), format!("weir-b{id}")] };
        let [a, b] = &network.names;
        let (left, right) = (format!("wa{id}"), format!("wb{id}"));
        let steps = [
            format!("netns add {a}"),
            format!("netns add {b}"),
            format!("link add {left} netns {a} type veth peer name {right} netns {b}"),
            format!("-n {a} addr add 10.77.0.1/24 dev {left}"),
            format!("-n {b} addr add 10.77.0.2/24 dev {right}"),
            format!("-n {a} link set {left} up"),
            format!("-n {b} link set {right} up"),
            format!("-n {a} link set lo up"),
            format!("-n {b} link set lo up"),
            format!("-n {a} route add default dev {left}"),
            format!("-n {b} route add default dev {right}"),
        ];
        let works = |step: &String| {
            Command::new("ip").args(step.split(' ')).output().is_ok_and(|out| out.status.success())
        };
        steps.iter().all(works).then_some(network)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

fn wait_for(child: &Program, words: &str) -> String {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let said = child.stderr();
        if let Some(line) = said.lines().find(|line| line.contains(words)) {
            return line.to_owned();
        }
        assert!(Instant::now() < end, "{words:?} isn't in: {said}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What looks like `K7QF-3MXA`.
fn code(line: &str) -> String {
    let words = line.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    let mut codes = words.filter(|word| word.len() == 9 && word.as_bytes()[4] == b'-');
    codes.next().unwrap_or_else(|| panic!("no code in {line:?}")).to_owned()
}

#[test]
fn a_machine_is_found_and_let_in_by_a_code_on_both_screens() {
    let Some(network) = Network::new() else {
        return skip("network namespaces need Linux, root and `ip`");
    };
    let [a, b] = &network.names;
    let (state, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let state = state.path().to_str().unwrap();
    let serve =
        ["serve", "--no-node", "--http", "127.0.0.1:8484", "--listen", "0.0.0.0:8484", "--state", state];
    let _serve = Program::within(a, &serve);
    let own = own.path().to_str().unwrap();
    let join = ["join", "--lan", "--name", "attic", "--model", "null", "--state", own];
    let mut alone = Program::within(b, &join);
    assert_eq!(alone.ended(Duration::from_secs(20)).code(), Some(1), "nobody is there to compare codes");
    assert!(alone.stderr().contains("--scheduler"), "{}", alone.stderr());
    let host = Command::new("hostname").output().unwrap();
    let host = String::from_utf8(host.stdout).unwrap().trim().to_lowercase();
    let host = host.split('.').next().unwrap();
    let named = [&join[..], &["--scheduler", host]].concat();
    // It looks for a few seconds only, and the scheduler may not have spoken yet.
    let node = Program::within(b, &named);
    let mine = code(&wait_for(&node, "asks to join"));
    let run = |words: &[&str]| {
        let mut child = Program::within(a, &[words, &["--state", state]].concat());
        let status = child.ended(Duration::from_secs(20));
        (status.success(), child.stdout(), child.stderr())
    };
    let (_, nodes, _) = run(&["nodes"]);
    assert!(nodes.contains(&mine) && nodes.contains("attic"), "{nodes}");
    let (good, _, said) = run(&["admit", "2222-2222"]);
    assert!(!good && said.contains("no machine asks"), "{said}");
    let (good, _, said) = run(&["admit", &mine]);
    assert!(good, "{said}");
    wait_for(&node, "Joined as attic");
    drop(node);
    // From now on it is known.
    let again = Program::within(b, &["join", "--name", "attic", "--model", "null", "--state", own]);
    wait_for(&again, "Joined as attic");
}
