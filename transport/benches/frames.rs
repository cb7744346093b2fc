//! What a token's frame costs on its way: `cargo bench -p weir-transport --bench frames`.
//!
//! Encoding, putting together what came off a stream, validating and reading in place, each alone; then all of it over QUIC.
//! Allocations are counted. Fails if reading allocates: there the only ones are to be QUIC's own.
#![allow(clippy::unwrap_used)] // a bench that panics has failed
use bytes::{Bytes, BytesMut};
use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use weir_scheduler::{RequestId, Token};
use weir_transport::{Assembler, Dialer, Frame, Identity, Listener, Message};

const FRAMES: u64 = 200_000;
/// Frames in what a stream hands over at once, when its reader is a little behind.
const BATCH: usize = 64;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: all work is the system allocator's; counting touches no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Nanoseconds and allocations a frame.
struct Cost(f64, f64);

fn cost(frames: u64, work: impl FnOnce()) -> Cost {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let began = Instant::now();
    work();
    let (time, after) = (began.elapsed(), ALLOCATIONS.load(Ordering::Relaxed));
    Cost(time.as_secs_f64() * 1e9 / frames as f64, (after - before) as f64 / frames as f64)
}

fn token(n: u64) -> Vec<Token> {
    vec![Token { position: n as u32, id: n as u32 % 50_000, text: " token".into(), logprob: None }]
}

fn encoded(n: u64) -> Frame {
    Frame::tokens(RequestId(7), 0, token(n))
}

/// Validates a frame and reads all of it, in place.
fn read(frame: &Frame) -> u64 {
    let Ok(Message::Tokens(tokens)) = frame.read() else { panic!("{frame:?}") };
    tokens.pieces().map(|(position, id, text)| u64::from(position) + u64::from(id) + text.len() as u64).sum()
}

fn main() {
    let inputs: Vec<Vec<Token>> = (0..FRAMES).map(token).collect();
    let mut frames = Vec::with_capacity(FRAMES as usize);
    let encode = cost(FRAMES, || {
        frames.extend(inputs.into_iter().map(|tokens| Frame::tokens(RequestId(7), 0, tokens)));
    });
    let chunks: Vec<Bytes> = frames.chunks(BATCH).map(chunk).collect();
    let mut assembler = Assembler::default();
    let assemble = cost(FRAMES, || {
        for chunk in chunks {
            assembler.push(chunk);
            while let Some(frame) = assembler.take().unwrap() {
                black_box(frame);
            }
        }
    });
    let reading = cost(FRAMES, || {
        for frame in &frames {
            black_box(read(frame));
        }
    });
    drop(frames);
    let (wire, rate) = over_quic();
    println!("{:<34}{:>12}{:>22}", "", "ns a frame", "allocations a frame");
    for (name, Cost(ns, allocations)) in [
        ("encode a token", &encode),
        ("put together", &assemble),
        ("validate and read", &reading),
        ("all of it, over QUIC, both ends", &wire),
    ] {
        println!("{name:<34}{ns:>12.0}{allocations:>22.3}");
    }
    println!("{rate:.0} frames/s over QUIC on loopback");
    assert!(assemble.1 == 0.0 && reading.1 == 0.0, "reading allocates");
}

/// As QUIC hands it over: one shared piece of memory.
fn chunk(frames: &[Frame]) -> Bytes {
    let mut bytes = BytesMut::new();
    frames.iter().for_each(|frame| bytes.extend_from_slice(frame.bytes()));
    let bytes = bytes.freeze();
    // The first clone makes it shared, which a packet's memory always is.
    drop(bytes.clone());
    bytes
}

fn over_quic() -> (Cost, f64) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let cluster = Identity::generate().unwrap();
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), &cluster).unwrap();
        let dialer = Dialer::new().unwrap();
        let address = [listener.address().unwrap().to_string()];
        let node = dialer.dial(&address, cluster.public().fingerprint()).await.unwrap();
        let (scheduler, _) = listener.accept().await.unwrap();
        let mut stream = node.open().await.unwrap();
        let sending = tokio::spawn(async move {
            for n in 0..FRAMES {
                stream.send.send(encoded(n)).await.unwrap();
            }
            stream.send.finish();
            // The stream lives until the other end has read it.
            tokio::time::sleep(Duration::from_millis(200)).await;
        });
        let mut stream = scheduler.accept().await.unwrap();
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        let began = Instant::now();
        while let Some(frame) = stream.receive.next().await.unwrap() {
            black_box(read(&frame));
        }
        let time = began.elapsed().as_secs_f64();
        let allocations = (ALLOCATIONS.load(Ordering::Relaxed) - before) as f64;
        sending.await.unwrap();
        (Cost(time * 1e9 / FRAMES as f64, allocations / FRAMES as f64), FRAMES as f64 / time)
    })
}
