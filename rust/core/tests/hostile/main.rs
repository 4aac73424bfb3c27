//! The fuzz targets without a fuzzing engine: seeds of our own, mutated the same way in every run.
//!
//! `make fuzz` runs the same targets for minutes, guided by coverage and with real seeds. What it
//! finds becomes a test beside the code or, where it needs a codec, in `tests/unit/test_codecs.py`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

mod targets;
#[allow(dead_code, clippy::unwrap_used)]
#[path = "../../src/testing.rs"]
mod testing;

use dicomnode_core::codec::{self, Codec, Decoded, Shape, Wish};
use dicomnode_core::receive::data_pdu;
use testing::{BIG, DEFLATED, EXPLICIT, IMPLICIT, Noise, Writer, image};

/// The system's memory, and how much of it is in use.
struct Meter;

#[global_allocator]
static METER: Meter = Meter;
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static START: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Meter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

fn start() {
    START.store(LIVE.load(Relaxed), Relaxed);
    PEAK.store(LIVE.load(Relaxed), Relaxed);
}

fn peak() -> usize {
    PEAK.load(Relaxed).saturating_sub(START.load(Relaxed))
}

/// A few bytes changed, dropped or put in; or cut off.
fn mutate(seed: &[u8], noise: &mut Noise) -> Vec<u8> {
    let mut data = seed.to_vec();
    for _ in 0..=noise.below(4) {
        if data.is_empty() {
            break;
        }
        let at = noise.below(data.len());
        match noise.below(10) {
            0..=3 => data[at] = noise.next() as u8,
            4..=5 => data[at] ^= 1 << noise.below(8),
            6 => data[at] = [0, 0x7F, 0x80, 0xFF][noise.below(4)],
            7 => drop(data.drain(at..(at + 1 + noise.below(8)).min(data.len()))),
            8 => data.insert(at, noise.next() as u8),
            _ => data.truncate(at),
        }
    }
    data
}

fn run(name: &str, seeds: &[Vec<u8>], count: usize) {
    let target = targets::find(name).expect("a target of that name");
    let mut noise = Noise::new();
    for seed in seeds {
        targets::check(target, seed, start, peak);
    }
    for _ in 0..count {
        let data = mutate(&seeds[noise.below(seeds.len())], &mut noise);
        targets::check(target, &data, start, peak);
    }
}

fn objects() -> Vec<Vec<u8>> {
    let mut objects: Vec<Vec<u8>> = [EXPLICIT, IMPLICIT, BIG]
        .iter()
        .map(|syntax| image(syntax).part10(syntax))
        .collect();
    let measures = Writer::new(EXPLICIT).text(0x0028_0030, "DS", "1\\1");
    let shared = Writer::new(EXPLICIT).sequence(0x0028_9110, "SQ", &measures, true);
    let plane = Writer::new(EXPLICIT).text(0x0020_0032, "DS", "1\\2\\3");
    let frame = Writer::new(EXPLICIT).sequence(0x0020_9113, "SQ", &plane, false);
    for defined in [false, true] {
        let mut enhanced = image(EXPLICIT);
        let pixels = enhanced.bytes.split_off(enhanced.bytes.len() - 24);
        let mut enhanced = enhanced
            .sequence(0x5200_9229, "SQ", &shared, defined)
            .sequence(0x5200_9230, "SQ", &frame, defined);
        enhanced.bytes.extend(pixels);
        objects.push(enhanced.part10(EXPLICIT));
    }
    let rle = "1.2.840.10008.1.2.5";
    let mut encapsulated = image(EXPLICIT);
    encapsulated.bytes.truncate(encapsulated.bytes.len() - 24);
    let encapsulated = encapsulated
        .fragments(&[&[], &rle_frame()])
        .end_of_sequence();
    objects.push(encapsulated.part10(rle));
    let mut deflated = Writer::new(EXPLICIT);
    let mut machine = flate2::write::DeflateEncoder::new(&mut deflated.bytes, Default::default());
    std::io::Write::write_all(&mut machine, &image(EXPLICIT).bytes).expect("memory takes it");
    machine.finish().expect("memory takes it");
    objects.push(deflated.part10(DEFLATED));
    objects
}

/// 3 x 2 cells of 16 bits: a literal, a run, and padding.
fn rle_frame() -> Vec<u8> {
    let mut header = [0_u32; 16];
    header[..3].copy_from_slice(&[2, 64, 72]);
    let header = header.iter().flat_map(|number| number.to_le_bytes());
    header
        .chain([5, 0, 1, 2, 3, 4, 5, 0, 0xFC, 9, 0x80, 0, 7, 0])
        .collect()
}

fn shaped(kind: u8) -> Vec<u8> {
    let mut data = vec![kind, 2, 0, 3, 0, 1, 16];
    data.extend(rle_frame());
    data
}

fn items() -> Vec<Vec<u8>> {
    let table = |offsets: &[u32]| -> Vec<u8> {
        offsets
            .iter()
            .flat_map(|number| number.to_le_bytes())
            .collect()
    };
    let start = b"\xFF\xD8\xFF\xE0";
    let made = [
        (1, vec![], vec![&start[..], b"more"]),
        (2, table(&[0, 24]), vec![&start[..], b"5678", start, b"12"]),
        (3, table(&[]), vec![b"12", b"34", b"56"]),
    ];
    let item = |(count, table, fragments): (u8, Vec<u8>, Vec<&[u8]>)| {
        let parts: Vec<&[u8]> = std::iter::once(table.as_slice()).chain(fragments).collect();
        let items = Writer::new(EXPLICIT).fragments(&parts).end_of_sequence();
        let mut data = vec![count, 0, 0];
        data.extend(items.bytes.iter().skip(12));
        data
    };
    made.into_iter().map(item).collect()
}

/// An echo, an image of several fragments, a query, an image of fragments of one byte, and a release.
fn sessions() -> Vec<Vec<u8>> {
    let element = |number: u16, value: &[u8]| -> Vec<u8> {
        let mut bytes = vec![0, 0];
        bytes.extend(number.to_le_bytes());
        bytes.extend((value.len() as u32).to_le_bytes());
        bytes.extend(value);
        bytes
    };
    let command = |field: u16, has_dataset: bool| -> Vec<u8> {
        let kind: u16 = if has_dataset { 1 } else { 0x0101 };
        [
            element(0x0002, b"1.2.840.10008.5.1.4.1.1.2\0"),
            element(0x0100, &field.to_le_bytes()),
            element(0x0110, &[1, 0]),
            element(0x0800, &kind.to_le_bytes()),
            element(0x1000, b"1.2.3\0"),
        ]
        .concat()
    };
    let image = image(EXPLICIT).bytes;
    let mut session = data_pdu(1, 3, &command(0x0030, false));
    session.extend(data_pdu(3, 3, &command(0x0001, true)));
    for part in image.chunks(100) {
        session.extend(data_pdu(3, 0, part));
    }
    session.extend(data_pdu(3, 2, &[]));
    session.extend(data_pdu(1, 3, &command(0x0020, true)));
    session.extend(data_pdu(1, 2, b"a query"));
    session.extend(data_pdu(3, 3, &command(0x0001, true)));
    for (k, byte) in image.iter().enumerate() {
        session.extend(data_pdu(
            3,
            if k + 1 == image.len() { 2 } else { 0 },
            &[*byte],
        ));
    }
    session.extend([5, 0, 0, 0, 0, 4, 0, 0, 0, 0]);
    let mut large = data_pdu(3, 3, &command(0x0001, true));
    large.extend(data_pdu(3, 2, &[7; 20_000]));
    let mut long = data_pdu(3, 3, &command(0x0001, true));
    long.extend(data_pdu(3, 0, &[7; 35_000]));
    long.extend(data_pdu(3, 0, &[8; 10_000]));
    let too_long = [&long[..], &data_pdu(3, 2, &[9; 10_000])].concat();
    long.extend(data_pdu(3, 2, &[9; 1000]));
    let cut = |size: u16, one: &[u8]| [&size.to_le_bytes()[..], one].concat();
    [1, 3, 1000, 20_000]
        .iter()
        .flat_map(|size| [cut(*size, &session), cut(*size, &large)])
        .chain([cut(1000, &long), cut(50_000, &long), cut(1000, &too_long)])
        .collect()
}

// One test, since all share the meter of memory.
#[test]
fn hostile_bytes_end_within_a_moment_in_bounded_memory_and_change_nothing_else() {
    run("scan", &objects(), 50_000);
    run("groups", &objects(), 50_000);
    run("fragments", &items(), 50_000);
    run("rle", &[shaped(2)], 50_000);
    run("codestream", &[shaped(1), shaped(2), shaped(3)], 50_000);
    run("decode", &objects(), 50_000);
    run("receive", &sessions(), 50_000);
}

#[test]
fn a_frame_that_cannot_hold_its_samples_is_an_error_before_memory_is_taken() {
    let shape = Shape {
        rows: 65_535,
        columns: 65_535,
        samples: 1,
        bits_allocated: 16,
    };
    // A lossless JPEG and a JPEG-LS of that size, up to their scans.
    let start = |marker: u8| {
        let size = [0, 11, 16, 0xFF, 0xFF, 0xFF, 0xFF, 1, 1, 0x11, 0];
        let scan = [0xFF, 0xDA, 0, 8, 1, 1, 0, 1, 0, 0, 0xFF, 0xD9];
        [&[0xFF, 0xD8, 0xFF, marker][..], &size, &scan].concat()
    };
    for (codec, frame) in [
        (Codec::Rle, rle_frame()),
        (Codec::Deflated, vec![3, 0]),
        (Codec::Plain, vec![0; 100]),
        (Codec::Jpeg, start(0xC3)),
        (Codec::Jpeg, start(0xC1)),
        (Codec::JpegLs, start(0xF7)),
    ] {
        let mut decoded = Decoded::default();
        let found = codec::decode(codec, &frame, shape, Wish::default(), &mut decoded);
        assert!(found.is_err(), "{codec:?}");
        assert!(decoded.bytes().is_empty(), "{codec:?}");
    }
}
