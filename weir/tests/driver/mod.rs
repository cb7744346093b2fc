//! The whole path within a process, on the null device: driver, scheduler, link, node, engine.
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Receiver;
use tokio::task::JoinSet;
use weir::driver::{Ask, Driver, DriverConfig, Generation, ModelSpec};
use weir_backends::null::{NULL_MODEL, Null, NullCost};
use weir_node::{Credentials, LoadOptions, Machine, Resident, Stock, Worker};
use weir_scheduler::{Event, Failure, FailureKind, Finish, Priority, Sampling, Usage};
use weir_transport::Link;

fn ask(prompt: Vec<u32>, max_tokens: u32) -> Ask {
    let sampling = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
    Ask { sampling, ..Ask::new(NULL_MODEL, prompt, max_tokens) }
}

/// A driver without models, for nodes to be attached to.
async fn scheduler() -> Driver {
    Driver::start(DriverConfig { no_node: true, ..DriverConfig::default() }).await.unwrap()
}

/// A null node whose steps take `step`; it is gone when the task is aborted.
struct Node {
    resident: Resident,
    task: tokio::task::JoinHandle<()>,
    engine: weir_backends::engine::EngineHandle,
}

impl Node {
    async fn attach(driver: &Driver, name: &str, step: Duration) -> Node {
        let cost = NullCost { step, ..NullCost::default() };
        Node::attach_null(driver, name, Null { cost, ..Null::default() }).await
    }

    async fn attach_null(driver: &Driver, name: &str, null: Null) -> Node {
        let loaded = weir_node::null(&null, LoadOptions::default()).unwrap();
        let engine = loaded.engine.clone();
        let resident = Resident::new(loaded.held, loaded.text, loaded.engine);
        let worker = Worker::new(name, Machine::default(), vec![resident.clone()], Stock::none());
        let (ours, theirs) = Link::in_memory();
        let mut nodes = driver.nodes();
        let before = *nodes.borrow();
        let task = tokio::spawn(async move { drop(worker.serve(&theirs, Credentials::default()).await) });
        driver.attach(ours);
        nodes.wait_for(|now| *now > before).await.unwrap();
        Node { resident, task, engine }
    }

    /// Waits until nothing runs there.
    async fn rests(&self) {
        let start = Instant::now();
        while self.engine.status().running + self.engine.status().queued > 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "it still runs: {:?}", self.engine.status());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// What a client saw: ids, text, end.
#[derive(Debug, PartialEq)]
struct Seen {
    ids: Vec<u32>,
    text: String,
    end: Result<(Finish, Usage), Failure>,
}

async fn read(generation: &mut Generation) -> Seen {
    read_events(&mut generation.events).await
}

async fn read_events(mut events: impl std::borrow::BorrowMut<Receiver<Event>>) -> Seen {
    let events = events.borrow_mut();
    let (mut ids, mut text) = (Vec::new(), String::new());
    loop {
        match events.recv().await.expect("a generation ends with an end") {
            Event::Token(token) => {
                assert_eq!(token.position as usize, ids.len(), "positions are contiguous");
                ids.push(token.id);
                text += &token.text;
            }
            Event::Finished { reason, text: rest, usage } => {
                text += &rest;
                assert!(events.recv().await.is_none(), "nothing follows the end");
                return Seen { ids, text, end: Ok((reason, usage)) };
            }
            Event::Failed(failure) => return Seen { ids, text, end: Err(failure) },
        }
    }
}

fn ids_and_text(seen: &Seen) -> (&[u32], &str) {
    (&seen.ids, &seen.text)
}

fn various(n: u32) -> Ask {
    let mut ask = ask((1..=n % 97 + 1).map(|i| i * 31 + n).collect(), 50 + n % 150);
    ask.sampling.seed = n.into();
    ask
}

/// Asks for `n` answers at once. Each comes with its number and the nodes that it came from.
fn streams(driver: &Driver, n: u32) -> JoinSet<(u32, Seen, Vec<Arc<str>>)> {
    let ask = |n| {
        let driver = driver.clone();
        async move {
            let mut generation = driver.generate(various(n)).await.unwrap();
            let seen = read(&mut generation).await;
            (n, seen, generation.nodes())
        }
    };
    (0..n).map(ask).collect()
}

/// The answers of one node that nobody disturbs.
async fn undisturbed(n: u32) -> Vec<Seen> {
    let driver = scheduler().await;
    let _node = Node::attach(&driver, "calm", Duration::ZERO).await;
    let mut all = Vec::new();
    for i in 0..n {
        all.push(read(&mut driver.generate(various(i)).await.unwrap()).await);
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_null_model_answers() {
    let config = DriverConfig { models: vec![ModelSpec::null()], ..DriverConfig::default() };
    let driver = Driver::start(config).await.unwrap();
    let model = driver.model("null").unwrap();
    assert_eq!(driver.models().len(), 1);
    let prompt = model.text().unwrap().0.encode("Grüß Gott", weir_backends::text::Special::AsText);
    assert_eq!(model.text().unwrap().0.decode(&prompt), "Grüß Gott");
    let mut generation = driver.generate(ask(prompt, 20)).await.unwrap();
    let seen = read(&mut generation).await;
    assert_eq!(seen.ids.len(), 20);
    assert_eq!(seen.text, model.text().unwrap().0.decode(&seen.ids));
    let usage = Usage { prompt_tokens: 11, cached_tokens: 0, output_tokens: 20 };
    assert_eq!(seen.end, Ok((Finish::Length, usage)));
    assert_eq!(generation.nodes().len(), 1);
    let health = driver.health();
    assert!(health.live && health.ready, "{health:?}");

    let unknown = Ask { model: weir_scheduler::ModelId([1; 32]), ..ask(vec![1], 1) };
    assert_eq!(driver.generate(unknown).await.unwrap_err().kind, FailureKind::NoModel);
    let long = driver.generate(ask(vec![1; 9000], 1)).await.unwrap_err();
    assert_eq!(long.kind, FailureKind::Invalid);
    let senseless = ask(vec![1 << 30], 1);
    assert_eq!(
        read(&mut driver.generate(senseless).await.unwrap()).await.end.unwrap_err().kind,
        FailureKind::Invalid
    );

    driver.shutdown().await;
    assert!(!driver.health().live);
    assert_eq!(driver.generate(ask(vec![1], 1)).await.unwrap_err().kind, FailureKind::Busy);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_streams_outlive_their_node() {
    let expected = undisturbed(100).await;
    let driver = scheduler().await;
    let step = Duration::from_millis(2);
    let first = Node::attach(&driver, "first", step).await;
    let mut streams = streams(&driver, 100);
    let second = Node::attach(&driver, "second", step).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    first.task.abort();
    let mut moved = 0;
    while let Some(done) = streams.join_next().await {
        let (n, seen, nodes) = done.unwrap();
        assert_eq!(ids_and_text(&seen), ids_and_text(&expected[n as usize]), "request {n} on {nodes:?}");
        let (reason, usage) = seen.end.unwrap();
        let (undisturbed_reason, undisturbed_usage) = *expected[n as usize].end.as_ref().unwrap();
        assert_eq!((reason, usage.output_tokens), (undisturbed_reason, undisturbed_usage.output_tokens));
        moved += usize::from(nodes.len() > 1);
    }
    assert!(moved > 0, "the first node was killed too late to matter");
    first.rests().await;
    second.rests().await;
    assert_eq!(second.resident.trouble(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_no_node_left_it_fails_and_says_so() {
    let driver = scheduler().await;
    let node = Node::attach(&driver, "only", Duration::from_millis(5)).await;
    let mut generation = driver.generate(ask(vec![1, 2], 5000)).await.unwrap();
    assert!(matches!(generation.events.recv().await, Some(Event::Token(_))));
    node.task.abort();
    let mut last = None;
    while let Some(event) = generation.events.recv().await {
        last = Some(event);
    }
    let Some(Event::Failed(failure)) = last else { panic!("{last:?}") };
    assert_eq!(failure.kind, FailureKind::Internal);
    assert!(failure.message.contains("only") || failure.message.contains("stream"), "{}", failure.message);
    let mut nodes = driver.nodes();
    nodes.wait_for(|nodes| *nodes == 0).await.unwrap();
    assert!(!driver.health().ready);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_go_away_cost_nothing() {
    let driver = scheduler().await;
    let node = Node::attach(&driver, "n", Duration::from_millis(1)).await;
    let mut kept = Vec::new();
    for n in 0..120 {
        let mut generation = driver.generate(ask(vec![n + 1], 4000)).await.unwrap();
        if n % 3 == 0 && n < 48 {
            generation.events.recv().await;
        }
        if n % 40 == 0 {
            kept.push(driver.generate(ask(vec![n + 1], 10)).await.unwrap());
        }
    }
    for mut generation in kept {
        assert_eq!(read(&mut generation).await.ids.len(), 10);
    }
    node.rests().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stalls_slows_only_itself() {
    let driver = scheduler().await;
    let node = Node::attach(&driver, "n", Duration::ZERO).await;
    let mut stalled = driver.generate(ask(vec![5], 5000)).await.unwrap();
    for n in 0..20 {
        let seen = read(&mut driver.generate(ask(vec![n + 1], 200)).await.unwrap()).await;
        assert_eq!(seen.ids.len(), 200);
    }
    let before = node.engine.status().tokens_generated;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let ahead = node.engine.status().tokens_generated;
    assert_eq!(ahead, before, "its sequence rests");
    assert!(ahead - 20 * 200 < 2000, "what is under way is bounded: {}", ahead - 4000);
    let seen = read(&mut stalled).await;
    assert_eq!(seen.ids.len(), 5000);
    let quick = read(&mut driver.generate(ask(vec![5], 5000)).await.unwrap()).await;
    assert_eq!(ids_and_text(&seen), ids_and_text(&quick));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_that_make_no_sense_are_refused() {
    let mut paced = ModelSpec::parse_null("null:step_us=100,end=50").unwrap().unwrap();
    assert_eq!(paced.name, "null");
    paced.name = "again".into();
    let twice = vec![ModelSpec::null(), paced];
    assert!(Driver::start(DriverConfig { models: twice, ..DriverConfig::default() }).await.is_err());
    assert!(ModelSpec::parse_null("smollm2").is_none());
    assert!(ModelSpec::parse_null("null:step=x").unwrap().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_engine_is_unhealthy() {
    let doomed = ModelSpec::parse_null("null:fail_after=20").unwrap().unwrap();
    let config = DriverConfig { models: vec![doomed], ..DriverConfig::default() };
    let driver = Driver::start(config).await.unwrap();
    assert!(driver.health().ready);
    let seen = read(&mut driver.generate(ask(vec![1, 2], 1000)).await.unwrap()).await;
    let failure = seen.end.unwrap_err();
    assert_eq!(failure.kind, FailureKind::Internal);
    // the stream's own end, or the node's report, whichever comes first
    let says = ["as it was told to", "died"];
    assert!(says.iter().any(|says| failure.message.contains(says)), "{}", failure.message);
    assert!(seen.ids.len() <= 20);
    // the stream's end comes before the engine has said how it is
    let until = Instant::now() + Duration::from_secs(10);
    while driver.health().live && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let health = driver.health();
    assert!(!health.live && !health.ready && health.detail.starts_with("null: "), "{health:?}");
    assert!(health.detail.contains("as it was told to"), "{health:?}");
    // refused, or accepted and failed: but at once
    match driver.generate(ask(vec![3], 10)).await {
        Err(failure) => assert_ne!(failure.kind, FailureKind::Invalid, "{}", failure.message),
        Ok(mut generation) => assert!(read(&mut generation).await.end.is_err()),
    }
    driver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_outlive_their_engine() {
    let expected = undisturbed(20).await;
    let driver = scheduler().await;
    let step = Duration::from_millis(1);
    let cost = NullCost { step, ..NullCost::default() };
    let doomed = Node::attach_null(&driver, "doomed", Null { cost, fail_after: 40, ..Null::default() }).await;
    let mut streams = streams(&driver, 20);
    let heir = Node::attach(&driver, "heir", step).await;
    while let Some(done) = streams.join_next().await {
        let (n, seen, nodes) = done.unwrap();
        assert_eq!(ids_and_text(&seen), ids_and_text(&expected[n as usize]), "request {n} on {nodes:?}");
        assert_eq!(&*nodes[nodes.len() - 1], "heir", "request {n}");
    }
    assert!(doomed.resident.trouble().is_some());
    assert_eq!(heir.resident.trouble(), None);
    let seen = read(&mut driver.generate(various(1)).await.unwrap()).await;
    assert_eq!(ids_and_text(&seen), ids_and_text(&expected[1]), "and new ones are served");
}

/// A real model from its file through load, node, link and scheduler: the tokens that its engine gives when it is
/// asked directly.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_model_answers_through_the_whole_path() {
    let folder = std::env::var_os("WEIR_TEST_MODELS").map(std::path::PathBuf::from);
    let Some(path) = folder.map(|folder| folder.join("smollm2.gguf")).filter(|path| path.is_file()) else {
        assert!(std::env::var_os("CI").is_none(), "CI needs WEIR_TEST_MODELS, a folder with smollm2.gguf");
        eprintln!("SKIPPED: WEIR_TEST_MODELS is no folder with smollm2.gguf");
        return;
    };
    let config = DriverConfig { models: vec![ModelSpec::file("m", &path)], ..DriverConfig::default() };
    let driver = Driver::start(config).await.unwrap();
    let model = driver.model("m").unwrap();
    assert_eq!((model.context, model.text().unwrap().0.len()), (8192, 49152));
    let prompt = model
        .text()
        .unwrap()
        .0
        .encode_prompt("The capital of France is", weir_backends::text::Special::Parse);
    let greedy = Ask { model: model.id, sampling: Sampling::default(), ..ask(prompt, 40) };
    let mut both = JoinSet::new();
    for _ in 0..2 {
        let (driver, ask) = (driver.clone(), greedy.clone());
        both.spawn(async move { read(&mut driver.generate(ask).await.unwrap()).await });
    }
    let seen = both.join_all().await;
    assert!(seen[0].text.contains("Paris"), "{}", seen[0].text);
    assert_eq!(ids_and_text(&seen[0]), ids_and_text(&seen[1]));
    driver.shutdown().await;

    let cpu = weir_backends::cpu::Cpu::new(Default::default());
    let direct = weir_backends::load::load(&path, Some(model.id), &cpu, LoadOptions::default()).unwrap();
    let (sink, events) = tokio::sync::mpsc::channel(64);
    direct.engine.generate(greedy, sink).unwrap();
    assert_eq!(seen[0], read_events(events).await);
}

/// Not a test of speed, since machines are shared; but it says what it saw.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_path_costs() {
    let driver = scheduler().await;
    let _node = Node::attach(&driver, "n", Duration::ZERO).await;
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    for n in 0..300 {
        let start = Instant::now();
        let mut generation = driver.generate(ask(vec![n + 1], 100)).await.unwrap();
        generation.events.recv().await.unwrap();
        first.push(start.elapsed());
        read_rest(&mut generation).await;
        rest.push(start.elapsed() / 100);
    }
    first.sort();
    rest.sort();
    println!("first token p50 {:?} p99 {:?}; a token p50 {:?}", first[150], first[297], rest[150]);
    assert!(first[150] < Duration::from_millis(20), "something sleeps on the path");
}

async fn read_rest(generation: &mut Generation) {
    while generation.events.recv().await.is_some() {}
}

/// A request that somebody watches and that is slow to begin is tried by a second node; the one that was too late has had
/// no part in the answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_loser_of_a_hedge_took_no_part() {
    let driver = scheduler().await;
    let cost = NullCost { prefill_row: Duration::from_millis(20), ..NullCost::default() };
    let slow = Node::attach_null(&driver, "slow", Null { cost, ..Null::default() }).await;
    let watched = Ask { priority: Priority::Interactive, ..ask((1..=300).collect(), 30) };
    let mut generation = driver.generate(watched).await.unwrap();
    let _fast = Node::attach(&driver, "fast", Duration::from_millis(1)).await;
    let seen = read(&mut generation).await;
    assert_eq!(seen.ids.len(), 30);
    let nodes = generation.nodes();
    assert_eq!(nodes.iter().map(|name| &**name).collect::<Vec<_>>(), ["fast"]);
    slow.rests().await;
}
