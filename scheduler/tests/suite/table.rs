//! What placement is worth: the shipped scheduler against round robin and capacity-weighted least loaded, on mixed
//! hardware under virtual time.
//!
//! `cargo xtask sim` prints it. Machines are slower or faster than they say, by up to 1.6 times, and outputs are longer
//! or shorter than expected. A machine steps as an engine does: a chunk of a prompt and a token of each running sequence.
use crate::random::Rng;
use crate::samples::{MODEL, ask, profile};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::time::Duration;
use weir_scheduler::{
    BlockKey, Event, Fastest, Finish, FromNode, Generate, Input, KvType, Limits, ModelStatus, NodeId, Output,
    Rates, RequestId, Scheduler, Status, Time, ToNode, Token, Usage, chain,
};

const CHUNK: u64 = 256;
const REQUESTS: u64 = 1500;
/// Blocks that a machine's cache holds.
const CACHE_BLOCKS: usize = 512;

/// A sequence on a machine.
struct Job {
    request: RequestId,
    attempt: u32,
    left: u64,
    keys: Vec<BlockKey>,
    output: u32,
    made: u32,
}

/// What a machine truly is.
struct Machine {
    rates: Rates,
    slots: usize,
    running: Vec<Job>,
    queue: VecDeque<Job>,
    cache: VecDeque<BlockKey>,
    cached: HashSet<BlockKey>,
    stepping: bool,
    steps: u64,
}

impl Machine {
    fn new(prefill: f32, alone_ms: f64, full_ms: f64, slots: usize) -> Machine {
        let rates = Rates {
            prefill_tokens_per_s: prefill,
            token_time_alone: Duration::from_secs_f64(alone_ms / 1e3),
            token_time_full: Duration::from_secs_f64(full_ms / 1e3),
        };
        let (running, queue, cache) = (Vec::new(), VecDeque::new(), VecDeque::new());
        Machine { rates, slots, running, queue, cache, cached: HashSet::new(), stepping: false, steps: 0 }
    }

    fn take(&mut self, mut job: Job, tokens: u64) {
        let hit = job.keys.iter().take_while(|key| self.cached.contains(key)).count() as u64 * 32;
        job.left = (tokens - hit.min(tokens - 1)).max(1);
        self.queue.push_back(job);
    }

    /// How long the next step takes; none where there is nothing to do.
    fn step(&mut self) -> Option<Duration> {
        while self.running.len() < self.slots
            && let Some(job) = self.queue.pop_front()
        {
            self.running.push(job);
        }
        let chunk = self.running.iter().find(|j| j.left > 0).map_or(0, |j| j.left.min(CHUNK));
        let decoding = self.running.iter().filter(|j| j.left == 0).count() as u32;
        if self.running.is_empty() {
            return None;
        }
        let prefill = Duration::from_secs_f64(chunk as f64 / f64::from(self.rates.prefill_tokens_per_s));
        let decode =
            if decoding > 0 { self.rates.token_time(decoding, self.slots as u32) } else { Duration::ZERO };
        Some(prefill + decode)
    }

    /// The step is done: which jobs got a token, and which of them ended.
    fn done(&mut self) -> (Vec<(RequestId, u32, u32)>, Vec<Job>) {
        self.steps += 1;
        let mut tokens = Vec::new();
        let prefilling = self.running.iter().position(|j| j.left > 0);
        for (at, job) in self.running.iter_mut().enumerate() {
            if Some(at) == prefilling {
                job.left -= job.left.min(CHUNK);
            }
            if job.left == 0 {
                tokens.push((job.request, job.attempt, job.made));
                job.made += 1;
            }
        }
        if let Some(job) = prefilling.map(|at| &self.running[at]).filter(|job| job.left == 0) {
            for key in &job.keys {
                if self.cached.insert(*key) {
                    self.cache.push_back(*key);
                }
            }
            while self.cache.len() > CACHE_BLOCKS {
                let oldest = self.cache.pop_front().expect("it is not empty");
                self.cached.remove(&oldest);
            }
        }
        let (ended, running) =
            std::mem::take(&mut self.running).into_iter().partition(|j| j.made >= j.output);
        self.running = running;
        (tokens, ended)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Placing {
    RoundRobin,
    /// Fewest requests by slots and speed.
    LeastLoaded,
    Ours,
}

#[derive(Debug)]
enum Happening {
    Asks(u64),
    Steps(usize),
    Beats,
}

struct Asked {
    ask: Generate,
    output: u32,
    at: Time,
    first: Option<Time>,
    end: Option<Time>,
}

struct Field {
    machines: Vec<Machine>,
    weights: Vec<f64>,
    placing: Placing,
    next: usize,
    scheduler: Scheduler,
    agenda: BTreeMap<(Time, u64), Happening>,
    number: u64,
    now: Time,
    asked: Vec<Asked>,
    ended: u64,
}

/// What there is, and what is asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pool {
    /// Two large, four middling and six small machines; chats that begin alike, and long documents.
    Mixed,
    /// Eight equal machines, and prompts that have nothing in common: nothing to be clever about.
    Even,
}

fn machines(pool: Pool) -> Vec<Machine> {
    let mut all = Vec::new();
    if pool == Pool::Even {
        all.extend((0..8).map(|_| Machine::new(1500.0, 15.0, 32.0, 16)));
        return all;
    }
    all.extend((0..2).map(|_| Machine::new(8000.0, 5.0, 14.0, 32)));
    all.extend((0..4).map(|_| Machine::new(1500.0, 15.0, 32.0, 16)));
    all.extend((0..6).map(|_| Machine::new(250.0, 60.0, 140.0, 8)));
    all
}

fn requests(pool: Pool, rng: &mut Rng) -> Vec<(Vec<u32>, u32)> {
    let request = |n: u64, rng: &mut Rng| match rng.between(0, 9) {
        0..=6 => {
            let system = if pool == Pool::Mixed { rng.between(0, 15) as u32 } else { 10_000 + n as u32 };
            let own = (0..rng.between(32, 256)).map(|i| (n * 1000 + i) as u32);
            ((0..512).map(|i| system * 1000 + i).chain(own).collect(), rng.between(16, 256) as u32)
        }
        _ => (
            (0..rng.between(800, 3000)).map(|i| (n * 5000 + i) as u32).collect(),
            rng.between(16, 128) as u32,
        ),
    };
    (0..REQUESTS).map(|n| request(n, rng)).collect()
}

impl Field {
    fn new(placing: Placing, pool: Pool, load: f64, seed: u64) -> Field {
        let mut rng = Rng(seed);
        let machines = machines(pool);
        let all = requests(pool, &mut rng);
        let mean = |f: fn(&(Vec<u32>, u32)) -> f64| all.iter().map(f).sum::<f64>() / all.len() as f64;
        let (prompt, output) = (mean(|r| r.0.len() as f64), mean(|r| f64::from(r.1)));
        let capacity: f64 = machines
            .iter()
            .map(|m| {
                let decode = output * m.rates.token_time_full.as_secs_f64() / m.slots as f64;
                1.0 / (decode + prompt / f64::from(m.rates.prefill_tokens_per_s))
            })
            .sum();
        let mut field = Field {
            weights: Vec::new(),
            placing,
            next: 0,
            scheduler: Scheduler::new(
                Limits { waiting_max: 1 << 20, ..Limits::default() },
                Box::new(Fastest),
                seed,
            ),
            agenda: BTreeMap::new(),
            number: 0,
            now: Time::ZERO,
            asked: Vec::new(),
            ended: 0,
            machines,
        };
        for at in 0..field.machines.len() {
            field.introduce(at, 0.6 + rng.share());
        }
        let mut at = Duration::ZERO;
        for (n, (prompt, output)) in all.into_iter().enumerate() {
            at += Duration::from_secs_f64(-(1.0 - rng.share()).ln() / (load * capacity));
            let mut ask = ask(n as u64, prompt, 4096);
            ask.request = RequestId(n as u64);
            let at = Time::ZERO + at;
            field.asked.push(Asked { ask, output, at, first: None, end: None });
            field.plan(at, Happening::Asks(n as u64));
        }
        field.plan(Time::ZERO, Happening::Beats);
        field
    }

    /// A machine says that it is `wrong` times as fast as it is.
    fn introduce(&mut self, at: usize, wrong: f64) {
        let machine = &self.machines[at];
        let stated = Rates {
            prefill_tokens_per_s: machine.rates.prefill_tokens_per_s * wrong as f32,
            token_time_alone: machine.rates.token_time_alone.div_f64(wrong),
            token_time_full: machine.rates.token_time_full.div_f64(wrong),
        };
        self.weights.push(machine.slots as f64 / stated.token_time_full.as_secs_f64());
        let mut said = profile(&format!("m{at}"), machine.slots as u32);
        said.models[0].rates = stated;
        said.models[0].context = 8192;
        said.models[0].kv_blocks = CACHE_BLOCKS as u32;
        self.scheduler.handle(Time::ZERO, Input::Connected { node: NodeId(at as u64), profile: said });
    }

    fn plan(&mut self, at: Time, what: Happening) {
        self.number += 1;
        self.agenda.insert((at, self.number), what);
    }

    fn run(&mut self) {
        while self.ended < REQUESTS {
            let next = self.agenda.first_key_value().map(|(key, _)| key.0).expect("beats never end");
            match self.scheduler.wake_at().filter(|wake| self.placing == Placing::Ours && *wake <= next) {
                Some(wake) => {
                    self.now = self.now.max(wake);
                    self.tell(Input::Tick);
                }
                None => {
                    let (key, what) = self.agenda.pop_first().expect("looked at above");
                    self.now = self.now.max(key.0);
                    self.happen(what);
                }
            }
        }
    }

    fn happen(&mut self, what: Happening) {
        match what {
            Happening::Asks(n) if self.placing == Placing::Ours => {
                let ask = self.asked[n as usize].ask.clone();
                self.tell(Input::Submit(Box::new(ask)));
            }
            Happening::Asks(n) => {
                let at = self.choose();
                self.give(at, &self.asked[n as usize].ask.clone());
            }
            Happening::Steps(at) => self.stepped(at),
            Happening::Beats => {
                for at in 0..self.machines.len() {
                    let steps = self.machines[at].steps;
                    let (model, alive) = (MODEL, true);
                    let (running, waiting, queued_tokens, kv_blocks_free) = (0, 0, 0, 0);
                    let news = ModelStatus {
                        model,
                        alive,
                        running,
                        waiting,
                        queued_tokens,
                        kv_blocks_free,
                        steps,
                        rates: None,
                    };
                    let from = FromNode::Status(Status { models: vec![news], ..Status::default() });
                    self.tell(Input::Node { node: NodeId(at as u64), from });
                }
                self.plan(self.now + Duration::from_millis(500), Happening::Beats);
            }
        }
    }

    fn choose(&mut self) -> usize {
        let load = |at: usize| {
            let machine = &self.machines[at];
            (machine.running.len() + machine.queue.len() + 1) as f64 / self.weights[at]
        };
        match self.placing {
            Placing::LeastLoaded => {
                (0..self.machines.len()).min_by(|a, b| load(*a).total_cmp(&load(*b))).expect("there are some")
            }
            _ => {
                self.next += 1;
                self.next % self.machines.len()
            }
        }
    }

    fn give(&mut self, at: usize, ask: &Generate) {
        let keys = chain(MODEL, KvType::F16, 0, &ask.prompt).collect();
        let (request, attempt) = (ask.request, ask.attempt);
        let (output, made) = (self.asked[request.0 as usize].output, ask.output.len() as u32);
        let tokens = (ask.prompt.len() + ask.output.len()) as u64;
        self.machines[at].take(Job { request, attempt, left: 0, keys, output, made }, tokens);
        self.go_on(at);
    }

    fn go_on(&mut self, at: usize) {
        if !self.machines[at].stepping
            && let Some(takes) = self.machines[at].step()
        {
            self.machines[at].stepping = true;
            self.plan(self.now + takes, Happening::Steps(at));
        }
    }

    fn stepped(&mut self, at: usize) {
        self.machines[at].stepping = false;
        let (tokens, ended) = self.machines[at].done();
        let node = NodeId(at as u64);
        let ours = self.placing == Placing::Ours;
        for (request, attempt, position) in tokens {
            self.asked[request.0 as usize].first.get_or_insert(self.now);
            if ours {
                let token = Token { position, id: 1, text: String::new(), logprob: None };
                let from = FromNode::Event { request, attempt, event: Event::Token(token) };
                self.tell(Input::Node { node, from });
            }
        }
        for job in ended {
            self.asked[job.request.0 as usize].end = Some(self.now);
            self.ended += 1;
            if ours {
                let usage = Usage { cached_tokens: u32::MAX, ..Usage::default() };
                let event = Event::Finished { reason: Finish::Stop, text: String::new(), usage };
                let from = FromNode::Event { request: job.request, attempt: job.attempt, event };
                self.tell(Input::Node { node, from });
            }
        }
        self.go_on(at);
    }

    fn tell(&mut self, input: Input) {
        if self.placing != Placing::Ours {
            return;
        }
        self.scheduler.handle(self.now, input);
        while let Some(output) = self.scheduler.poll() {
            match output {
                Output::Send { node, message: ToNode::Generate(ask) } => self.give(node.0 as usize, &ask),
                Output::Send { node, message: ToNode::Cancel { request, attempt } } => {
                    let machine = &mut self.machines[node.0 as usize];
                    machine.running.retain(|j| (j.request, j.attempt) != (request, attempt));
                    machine.queue.retain(|j| (j.request, j.attempt) != (request, attempt));
                }
                Output::Emit { request, event: Event::Failed(failure) } => {
                    panic!("{request:?} failed: {}", failure.message)
                }
                Output::Send { message: ToNode::Load { .. } | ToNode::Unload { .. }, .. }
                | Output::Emit { .. }
                | Output::Found { .. }
                | Output::Reserved { .. }
                | Output::Settled { .. }
                | Output::Spent { .. }
                | Output::Disconnect { .. } => {}
            }
        }
    }
}

/// Times to the first and the last token, and tokens a second.
struct Result {
    ttft: [f64; 2],
    total: [f64; 2],
    tokens_per_s: f64,
}

/// Averages over a few seeds.
fn check(placing: Placing, pool: Pool, load: f64) -> Result {
    const SEEDS: u64 = 3;
    let mut sum = Result { ttft: [0.0; 2], total: [0.0; 2], tokens_per_s: 0.0 };
    for seed in 0..SEEDS {
        let one = run(placing, pool, load, seed);
        let share = |all: &mut [f64; 2], one: [f64; 2]| (0..2).for_each(|i| all[i] += one[i] / SEEDS as f64);
        share(&mut sum.ttft, one.ttft);
        share(&mut sum.total, one.total);
        sum.tokens_per_s += one.tokens_per_s / SEEDS as f64;
    }
    sum
}

fn run(placing: Placing, pool: Pool, load: f64, seed: u64) -> Result {
    let mut field = Field::new(placing, pool, load, seed);
    field.run();
    let percentiles = |time: fn(&Asked) -> Option<Time>| {
        let mut all: Vec<f64> =
            field.asked.iter().map(|a| time(a).expect("it ended").since(a.at).as_secs_f64()).collect();
        all.sort_by(f64::total_cmp);
        [all[all.len() / 2], all[all.len() * 99 / 100]]
    };
    // Until 95% have ended: the very last says more of chance than of throughput.
    let mut ends: Vec<(Time, u32)> =
        field.asked.iter().map(|a| (a.end.expect("it ended"), a.output)).collect();
    ends.sort();
    ends.truncate(ends.len() * 95 / 100);
    let tokens: u32 = ends.iter().map(|(_, output)| output).sum();
    let until = ends.last().expect("there are many").0;
    Result {
        ttft: percentiles(|a| a.first),
        total: percentiles(|a| a.end),
        tokens_per_s: f64::from(tokens) / until.since(Time::ZERO).as_secs_f64(),
    }
}

#[test]
fn placement_on_mixed_hardware() {
    println!("\n| pool | load | placing | TTFT p50 | p99 | total p50 | p99 | tokens/s |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for (pool, load) in [(Pool::Mixed, 0.5), (Pool::Mixed, 1.2), (Pool::Even, 0.5), (Pool::Even, 1.2)] {
        let all =
            [Placing::RoundRobin, Placing::LeastLoaded, Placing::Ours].map(|p| (p, check(p, pool, load)));
        for (placing, r) in &all {
            println!(
                "| {pool:?} | {load} | {placing:?} | {:.3} s | {:.2} s | {:.2} s | {:.1} s | {:.0} |",
                r.ttft[0], r.ttft[1], r.total[0], r.total[1], r.tokens_per_s
            );
        }
        let [_, (_, least), (_, ours)] = &all;
        if pool == Pool::Mixed {
            assert!(
                ours.ttft[0] < least.ttft[0] && ours.total[0] < least.total[0],
                "worse than least loaded"
            );
        }
        assert!(ours.tokens_per_s > 0.95 * least.tokens_per_s, "throughput was paid for it");
    }
}
