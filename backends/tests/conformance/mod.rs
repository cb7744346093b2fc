//! What every device must keep, checked on small random models: a token's logits are the same bits whatever else is in
//! the batch and however its prompt was cut, and two programs of half the layers equal one of all.
pub mod near;

use crate::draw::Draw;
use std::sync::Arc;
use weir_backends::gguf::ModelFile;
use weir_backends::models::random::Random;
use weir_backends::models::{self, FAMILIES};
use weir_backends::plan::Plan;
use weir_backends::program::{
    Batch, Device, Input, KvLayout, Program, SampleSpec, Segment, SegmentOutput, Want,
};
use weir_backends::reference::Reference;
use weir_scheduler::{KvType, Sampling};

const LAYOUT: KvLayout = KvLayout { blocks: 16, kv: KvType::F16, slots: 4, rows: 64 };

/// A random model of `family` with eight layers (every sixth of Gemma's differs).
pub fn model(family: &'static str, seed: u64) -> (ModelFile, Plan) {
    let mut random = Random::tiny(family, seed);
    random.shape.layers = 8;
    let file = random.file();
    let plan = models::plan(&file).unwrap();
    (file, plan)
}

/// Submits one batch and waits for what it gives.
pub fn step(program: &mut dyn Program, segments: Vec<Segment>) -> Vec<SegmentOutput> {
    program.submit(Batch { segments }).unwrap();
    loop {
        if let Some(output) = program.poll() {
            return output.unwrap().segments;
        }
    }
}

fn ids(seed: u64, n: usize) -> Vec<u32> {
    let mut draw = Draw::new(seed);
    (0..n).map(|_| draw.below(320)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    assert!(values.iter().all(|v| v.is_finite()));
    values.iter().map(|v| v.to_bits()).collect()
}

fn logits(output: &SegmentOutput) -> Vec<u32> {
    match output {
        SegmentOutput::Logits(logits) => bits(logits),
        other => panic!("{other:?}"),
    }
}

/// Three sequences, cut and mixed at random, against each of them alone and whole: prompts, and what comes after them.
pub fn check_invariance(device: &dyn Device, family: &'static str, seed: u64) {
    check_invariance_of(device, model(family, seed), [33, 0, 64], seed);
    check_invariance_of(device, model(family, seed), [0, 17, 31], seed);
}

/// The same for one model; `prompts`: how long each sequence's is.
pub fn check_invariance_of(
    device: &dyn Device,
    (file, plan): (ModelFile, Plan),
    prompts: [usize; 3],
    seed: u64,
) {
    eprintln!("prompts of {prompts:?}, seed {seed}");
    let all = 0..plan.layers.len();
    let sequences: Vec<Vec<u32>> = [50, 17, 64].map(|n| ids(seed + n as u64, n)).into();
    let prompts = [0, 1, 2].map(|s| prompts[s].min(sequences[s].len()));
    let alone: Vec<Vec<u32>> = sequences
        .iter()
        .zip(prompts)
        .map(|(ids, prompt)| {
            let mut program = device.compile(&file, &plan, all.clone(), LAYOUT).unwrap();
            let mut found = Vec::new();
            for (from, to) in [(0, prompt), (prompt, ids.len())].into_iter().filter(|(from, to)| from < to) {
                let (input, want) = (Input::Ids(ids[from..to].to_vec()), Want::Logits((to - from) as u32));
                let (start, prompt, blocks) = (from as u32, from < prompt, [0, 1].into());
                let segment = Segment { slot: 0, start, prompt, input, blocks, want };
                found.extend(logits(&step(&mut *program, vec![segment])[0]));
            }
            found
        })
        .collect();
    let tables: [Arc<[u32]>; 3] = [[9, 2].into(), [15].into(), [0, 7].into()];
    let mut program = device.compile(&file, &plan, all, LAYOUT).unwrap();
    let mut draw = Draw::new(seed);
    let mut done = [0; 3];
    while (0..3).any(|s| done[s] < sequences[s].len()) {
        let mut segments = Vec::new();
        let mut expected = Vec::new();
        for s in 0..3 {
            let prompt = done[s] < prompts[s];
            let left = if prompt { prompts[s] } else { sequences[s].len() } - done[s];
            let n = [0, 1, 1, 3, 16, 21][draw.below(6) as usize].min(left);
            if n == 0 {
                continue;
            }
            let (from, to) = (done[s], done[s] + n);
            let input = Input::Ids(sequences[s][from..to].to_vec());
            let want = Want::Logits(n as u32);
            let (slot, blocks) = (3 - s as u32, tables[s].clone());
            segments.push(Segment { slot, start: from as u32, prompt, input, blocks, want });
            expected.push(&alone[s][from * plan.vocab..to * plan.vocab]);
            done[s] = to;
        }
        for (output, expected) in step(&mut *program, segments).iter().zip(expected) {
            assert!(
                logits(output) == expected,
                "prompts of {prompts:?}, seed {seed}: other bits after {done:?}"
            );
        }
    }
}

/// Layers in two programs, the residual stream handed from one to the other.
pub fn check_halves(device: &dyn Device, family: &'static str) {
    let (file, plan) = model(family, 5);
    let layers = plan.layers.len();
    let mut whole = device.compile(&file, &plan, 0..layers, LAYOUT).unwrap();
    let mut first = device.compile(&file, &plan, 0..3, LAYOUT).unwrap();
    let mut second = device.compile(&file, &plan, 3..layers, LAYOUT).unwrap();
    let blocks: Arc<[u32]> = [3, 1].into();
    for start in [0, 30, 31] {
        let ids = ids(u64::from(start) + 1, if start == 0 { 30 } else { 1 });
        let want = Want::Logits(1);
        let segment =
            |input, want| Segment { slot: 0, start, prompt: false, input, blocks: blocks.clone(), want };
        let expected = step(&mut *whole, vec![segment(Input::Ids(ids.clone()), want.clone())]);
        let between = step(&mut *first, vec![segment(Input::Ids(ids), Want::Hidden)]);
        let [SegmentOutput::Hidden(hidden)] = &between[..] else { panic!("{between:?}") };
        let found = step(&mut *second, vec![segment(Input::Hidden(hidden.clone()), want)]);
        assert!(logits(&found[0]) == logits(&expected[0]), "{family} at {start}");
    }
}

/// An id sampled in one step goes into the next one by itself.
pub fn check_last_sampled(device: &dyn Device) {
    let (file, plan) = model("llama", 6);
    let spec = |position| SampleSpec {
        sampling: Arc::new(Sampling { temperature: 1.0, seed: 9, ..Sampling::default() }),
        position,
        counts: Vec::new(),
        mask: None,
    };
    let run = |by_id: bool| -> Vec<u32> {
        let mut program = device.compile(&file, &plan, 0..plan.layers.len(), LAYOUT).unwrap();
        let mut input = Input::Ids(ids(2, 20));
        let mut sampled = Vec::new();
        let mut start = 0;
        for position in 20..40 {
            let want = Want::Sample(vec![spec(position)]);
            let segment = Segment { slot: 2, start, prompt: false, input, blocks: [1, 0].into(), want };
            let output = step(&mut *program, vec![segment]);
            let [SegmentOutput::Sampled(tokens)] = &output[..] else { panic!("{output:?}") };
            let [token] = &tokens[..] else { panic!("{output:?}") };
            sampled.push(token.id);
            input = if by_id { Input::Ids(vec![token.id]) } else { Input::LastSampled };
            start = position;
        }
        sampled
    };
    assert_eq!(run(true), run(false));
}

/// Ids behind each of the last rows are those of one step after the other.
pub fn check_several_sampled(device: &dyn Device) {
    let (file, plan) = model("llama", 6);
    for temperature in [0.0, 1.0] {
        let sampling = Arc::new(Sampling { temperature, seed: 4, ..Sampling::default() });
        let spec =
            |position| SampleSpec { sampling: sampling.clone(), position, counts: Vec::new(), mask: None };
        let known = ids(5, 40);
        // Positions `cuts`, each segment's ids as many as its rows but in the prompt, of which the last three are asked for.
        let run = |cuts: &[usize]| -> Vec<u32> {
            let mut program = device.compile(&file, &plan, 0..plan.layers.len(), LAYOUT).unwrap();
            let mut found = Vec::new();
            for cut in cuts.windows(2) {
                let first = if cut[0] == 0 { cut[1] - 3 } else { cut[0] };
                let want = Want::Sample((first..cut[1]).map(|at| spec(at as u32 + 1)).collect());
                let input = Input::Ids(known[cut[0]..cut[1]].to_vec());
                let segment = Segment {
                    slot: 1,
                    start: cut[0] as u32,
                    prompt: false,
                    input,
                    blocks: [1, 0].into(),
                    want,
                };
                let other = Segment { slot: 2, blocks: [5, 6].into(), ..segment.clone() };
                let output = step(&mut *program, vec![segment, other]);
                let [SegmentOutput::Sampled(one), SegmentOutput::Sampled(two)] = &output[..] else {
                    panic!("{output:?}")
                };
                assert_eq!(one, two);
                found.extend(one.iter().map(|sampled| sampled.id));
            }
            found
        };
        let one_by_one: Vec<usize> = [0].into_iter().chain(20..=40).collect();
        assert_eq!(run(&[0, 20, 24, 25, 40]), run(&one_by_one), "temperature {temperature}");
    }
}

/// A batch that breaks the rules is an error, and the program lives on.
pub fn check_refusals(device: &dyn Device) {
    let (file, plan) = model("llama", 7);
    let layers = plan.layers.len();
    assert!(device.compile(&file, &plan, 0..layers + 1, LAYOUT).is_err());
    let mut program = device.compile(&file, &plan, 0..layers, LAYOUT).unwrap();
    let spec = || SampleSpec { sampling: Arc::default(), position: 1, counts: Vec::new(), mask: None };
    let good = || Segment {
        slot: 0,
        start: 0,
        prompt: false,
        input: Input::Ids(vec![1]),
        blocks: [0].into(),
        want: Want::Logits(1),
    };
    let bad = [
        Segment { slot: 4, ..good() },
        Segment { start: 32, ..good() },
        Segment { input: Input::Ids(vec![320]), ..good() },
        Segment { input: Input::Ids(Vec::new()), ..good() },
        Segment { input: Input::Hidden(vec![0.0; 64]), ..good() },
        Segment { blocks: [16].into(), ..good() },
        Segment { want: Want::Logits(2), ..good() },
        Segment { want: Want::Hidden, ..good() },
        Segment { want: Want::Sample(Vec::new()), ..good() },
        Segment { want: Want::Sample(vec![spec(); 2]), ..good() },
        Segment { input: Input::Ids(vec![1; 65]), blocks: [0, 1, 2].into(), ..good() },
    ];
    for segment in bad {
        assert!(program.submit(Batch { segments: vec![segment.clone()] }).is_err(), "{segment:?}");
    }
    let twice = vec![good(), Segment { blocks: [1].into(), ..good() }];
    assert!(program.submit(Batch { segments: twice }).is_err(), "a slot that is there twice");
    let mut second = device.compile(&file, &plan, 1..layers, LAYOUT).unwrap();
    for input in [Input::Ids(vec![1]), Input::LastSampled, Input::Hidden(vec![0.0; 63])] {
        let segment = Segment { input, ..good() };
        assert!(second.submit(Batch { segments: vec![segment.clone()] }).is_err(), "{segment:?}");
    }
    step(&mut *program, vec![good()]);
}

#[test]
fn the_reference_device_is_batch_invariant() {
    for (i, family) in FAMILIES.iter().enumerate() {
        check_invariance(&Reference::default(), family.architecture, 100 + i as u64);
    }
}

#[test]
fn two_halves_on_the_reference_device_equal_the_whole() {
    for family in FAMILIES {
        check_halves(&Reference::default(), family.architecture);
    }
}

#[test]
fn the_reference_device_remembers_what_it_sampled() {
    check_last_sampled(&Reference::default());
    check_several_sampled(&Reference::default());
}

#[test]
fn the_reference_device_refuses_bad_batches() {
    check_refusals(&Reference::default());
}
