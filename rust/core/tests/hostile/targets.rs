//! What is fuzzed, and what has to hold whatever the bytes are.
//!
//! No panic, for a start. Time and memory are bounded by [`check`]; what a target asserts itself is
//! told by its own comment. `rust/fuzz` runs these with a fuzzing engine, and `main.rs` beside this
//! file without.

use std::time::{Duration, Instant};

use dicomnode_core::codec::{self, Codec, Decoded, Shape, Wish};
use dicomnode_core::color::Space;
use dicomnode_core::digest::Kind;
use dicomnode_core::encapsulated::Frames;
use dicomnode_core::image::{self, Image};
use dicomnode_core::receive::{Limits, Receiver, Step, Store};
use dicomnode_core::scan::{self, Header};
use dicomnode_core::source::Source;
use dicomnode_core::stack::{Matrix, Reading, Slice, stack};

/// Takes one input; how many bytes of memory the pixels that it declares justify.
pub type Target = fn(&[u8]) -> usize;

pub const TARGETS: &[(&str, Target)] = &[
    ("scan", scan_header),
    ("groups", functional_groups),
    ("fragments", fragments),
    ("rle", rle),
    ("codestream", codestream),
    ("decode", decode),
    ("receive", receive),
];

/// Longest that one input may take; instrumented, this is some hundred times what it should.
const MOMENT: Duration = Duration::from_secs(1);
/// Memory that needs no reason.
const FREE: usize = 8 << 20;
/// Memory for each byte of input.
const FACTOR: usize = 128;
/// Deflate cannot reach more, and while a buffer grows there are two.
const INFLATED: usize = 3 * 1100;
/// Memory for each declared sample: its cell, planes, and a decoder's own copies of 32 bits.
const SAMPLE: usize = 64;
/// Images with more samples are left to the caller, who has to bring the array.
const MAX_SAMPLES: u64 = 1 << 16;

pub fn find(name: &str) -> Option<Target> {
    let found = TARGETS.iter().find(|(known, _)| *known == name);
    found.map(|(_, target)| *target)
}

/// Run one input, and assert that its time and its memory are bounded.
///
/// `start` and `peak` are a meter of memory.
pub fn check(target: Target, data: &[u8], start: fn(), peak: fn() -> usize) {
    let mut took = Duration::MAX;
    // The machine may have been busy with others: a slow input is slow each time.
    for _ in 0..3 {
        let begin = Instant::now();
        start();
        let justified = target(data);
        let found = peak();
        took = took.min(begin.elapsed());
        let allowed = FREE + FACTOR * data.len() + justified;
        assert!(
            found <= allowed,
            "expected at most {allowed} bytes of memory for {} bytes of input, found {found}",
            data.len()
        );
        if took < MOMENT {
            return;
        }
    }
    panic!("expected an end within {MOMENT:?}, found {took:?}");
}

/// The header scanner: every element lies within the object, and the pixels have no influence on it.
fn scan_header(data: &[u8]) -> usize {
    let guessed = scan::scan(Source::Bytes(data), None);
    let deflated = inflated(data);
    if let Ok(header) = &guessed {
        assert_within(header, data, deflated > 0);
        let pixels = header.layout().pixels().copied();
        if let Some(pixels) = pixels.filter(|_| header.layout().is_native() && deflated == 0) {
            let mut other = data.to_vec();
            let at = pixels.offset as usize;
            for byte in &mut other[at..at + pixels.length as usize] {
                *byte = !*byte;
            }
            let again = scan::scan(Source::Bytes(&other), None).expect("only pixels differ");
            assert_eq!(header.layout().entries(), again.layout().entries());
        }
    }
    // As DIMSE carries it: without meta information.
    for syntax in [
        "1.2.840.10008.1.2",
        "1.2.840.10008.1.2.1",
        "1.2.840.10008.1.2.2",
    ] {
        if let Ok(header) = scan::scan(Source::Bytes(data), Some(syntax)) {
            assert_within(&header, data, false);
        }
    }
    deflated
}

fn assert_within(header: &Header, data: &[u8], deflated: bool) {
    for tag in header.layout().tags() {
        let value = header
            .value(tag, Some(data))
            .expect("what was scanned can be read");
        let entry = header.layout().find(tag).expect("a tag of the layout");
        if let Some((_, value)) = value {
            assert_eq!(value.len(), entry.length as usize);
        } else if entry.length != scan::UNDEFINED && !deflated {
            assert!(entry.offset + u64::from(entry.length) <= data.len() as u64);
        }
    }
}

/// Memory for an object that says it is deflated.
fn inflated(data: &[u8]) -> usize {
    let has = |uid: &[u8]| data.windows(uid.len()).any(|part| part == uid);
    let says = has(b"1.2.840.10008.1.2.1.99") || has(b"1.2.840.10008.1.2.4");
    if says { INFLATED * data.len() } else { 0 }
}

/// The functional groups: as many frames as the header tells, each with its own number.
fn functional_groups(data: &[u8]) -> usize {
    let source = Source::Bytes(data);
    if let Ok(image) = image::scan_image(source, &mut Vec::new())
        && let Ok(frames) = image::frames(&image, source)
    {
        assert_eq!(frames.len(), image.number_of_frames as usize);
        for (number, frame) in frames.iter().enumerate() {
            assert_eq!(frame.frame as usize, number);
        }
    }
    inflated(data)
}

/// The encapsulation parser: every fragment belongs to one frame, in order, within the object.
///
/// Two bytes of NumberOfFrames, one byte of how many extended offsets, these, and the items.
fn fragments(data: &[u8]) -> usize {
    let Some((head, data)) = data.split_at_checked(3) else {
        return 0;
    };
    let count = u32::from(u16::from_le_bytes([head[0], head[1]]));
    let Some((offsets, items)) = data.split_at_checked(8 * usize::from(head[2])) else {
        return 0;
    };
    let source = Source::Bytes(items).open().expect("bytes need no file");
    let Ok(frames) = Frames::find(&source, 0, count, offsets) else {
        return 0;
    };
    // The Basic Offset Table is the item before the first fragment.
    let table = u32::from_le_bytes(items[4..8].try_into().expect("four bytes"));
    let mut end = 8 + u64::from(table);
    for frame in 0..count as usize {
        assert!(!frames.frame(frame).is_empty());
        for fragment in frames.frame(frame) {
            assert_eq!(fragment.offset, end + 8);
            end = fragment.offset + u64::from(fragment.length);
        }
    }
    assert!(frames.frame(count as usize).is_empty());
    assert!(end <= items.len() as u64);
    0
}

/// Seven bytes of what the header says, and the frame.
fn shaped(data: &[u8]) -> Option<(u8, Shape, &[u8])> {
    let (head, frame) = data.split_at_checked(7)?;
    let shape = Shape {
        rows: u32::from(u16::from_le_bytes([head[1], head[2]])),
        columns: u32::from(u16::from_le_bytes([head[3], head[4]])),
        samples: u32::from(head[5]),
        bits_allocated: u32::from(head[6]),
    };
    (samples(shape) <= MAX_SAMPLES).then_some((head[0], shape, frame))
}

fn samples(shape: Shape) -> u64 {
    u64::from(shape.rows) * u64::from(shape.columns) * u64::from(shape.samples)
}

/// RLE: what it decodes to can be encoded, and decodes to the same.
fn rle(data: &[u8]) -> usize {
    let Some((_, shape, frame)) = shaped(data) else {
        return 0;
    };
    if let Some(cells) = decoded_twice(Codec::Rle, frame, shape, Wish::default()) {
        let size = shape.bits_allocated as usize / 8;
        let segments = size * shape.samples as usize;
        let frame = encode_rle(&cells, size, segments);
        let again = decoded_twice(Codec::Rle, &frame, shape, Wish::default());
        assert_eq!(again.as_ref(), Some(&cells));
    }
    SAMPLE * samples(shape) as usize
}

/// A frame of any codec: every sample is written, so that what was in the buffer has no influence.
fn codestream(data: &[u8]) -> usize {
    let Some((kind, shape, frame)) = shaped(data) else {
        return 0;
    };
    let codecs = [Codec::Jpeg, Codec::Deflated, Codec::Rle, Codec::Plain];
    let wish = Wish {
        space: [Space::Rgb, Space::Ybr][usize::from(kind >> 2 & 1)],
        rgb: kind >> 3 & 1 == 1,
    };
    decoded_twice(codecs[usize::from(kind) % codecs.len()], frame, shape, wish);
    SAMPLE * samples(shape) as usize
}

/// The cells of a frame: into a new buffer and into a used one, which has to make no difference.
fn decoded_twice(codec: Codec, frame: &[u8], shape: Shape, wish: Wish) -> Option<Vec<u8>> {
    let mut decoded = Decoded::default();
    let found = codec::decode(codec, frame, shape, wish, &mut decoded);
    let cells = decoded.bytes().to_vec();
    let described = (decoded.allocated, decoded.precision, decoded.signed);
    let used = Shape {
        bits_allocated: 32,
        ..shape
    };
    let noise = vec![0xA5; 4 * samples(shape) as usize];
    // A frame without samples leaves the buffer as it was.
    let _ = codec::decode(Codec::Plain, &noise, used, wish, &mut decoded);
    let again = codec::decode(codec, frame, shape, wish, &mut decoded);
    assert_eq!(found.is_ok(), again.is_ok(), "{found:?} {again:?}");
    found.ok()?;
    assert_eq!(
        described,
        (decoded.allocated, decoded.precision, decoded.signed)
    );
    assert_eq!(
        cells.len(),
        (samples(shape) * u64::from(decoded.allocated) / 8) as usize
    );
    assert!(cells == decoded.bytes(), "a sample was not written");
    Some(cells)
}

/// PackBits without a run (PS3.5 annex G).
fn encode_rle(cells: &[u8], size: usize, segments: usize) -> Vec<u8> {
    let mut header = vec![segments as u32];
    let mut bodies = Vec::new();
    for segment in 0..segments {
        header.push(64 + bodies.len() as u32);
        let at = segment / size * size + (size - 1 - segment % size);
        let plane: Vec<u8> = cells.iter().skip(at).step_by(segments).copied().collect();
        for part in plane.chunks(128) {
            bodies.push(part.len() as u8 - 1);
            bodies.extend(part);
        }
    }
    header.resize(16, 0);
    let header = header.iter().flat_map(|number| number.to_le_bytes());
    header.chain(bodies).collect()
}

/// The whole way from an object to an array: what was in the array has no influence.
fn decode(data: &[u8]) -> usize {
    let source = Source::Bytes(data);
    let justified = inflated(data);
    let Ok(image) = image::scan_image(source, &mut Vec::new()) else {
        return justified;
    };
    let frames = match image::frames(&image, source) {
        Ok(frames) => frames,
        Err(_) => return justified,
    };
    let slices: Vec<Slice<'_>> = frames
        .iter()
        .take(2)
        .map(|image| Slice { image, source })
        .collect();
    let matrix = Matrix {
        rows: image.rows as usize,
        columns: image.columns as usize,
        samples: image.samples_per_pixel as usize,
    };
    let count = matrix.rows * matrix.columns;
    let count = count
        .saturating_mul(matrix.samples)
        .saturating_mul(slices.len());
    if count as u64 > MAX_SAMPLES {
        return justified;
    }
    let reading = Reading {
        rescale: data.len() & 1 == 0,
        rgb: data.len() & 2 == 0,
    };
    let mut first = vec![0.0_f64; count];
    let mut second = vec![-1.0_f64; count];
    let found = stack(&slices, matrix, &mut first, reading);
    // A fresh image forgets where the fragments are.
    let images: Vec<Image> = slices
        .iter()
        .map(|slice| Image {
            frames: std::sync::Arc::default(),
            ..slice.image.clone()
        })
        .collect();
    let slices: Vec<Slice<'_>> = images.iter().map(|image| Slice { image, source }).collect();
    let again = stack(&slices, matrix, &mut second, reading);
    assert_eq!(found.is_ok(), again.is_ok(), "{found:?} {again:?}");
    if let Ok(notes) = found {
        assert_eq!(notes, again.unwrap_or_default());
        let bits = |values: &[f64]| {
            values
                .iter()
                .map(|value| value.to_bits())
                .collect::<Vec<_>>()
        };
        assert!(bits(&first) == bits(&second), "a value was not written");
    }
    justified + SAMPLE * count
}

/// What a stranger sends: however it is cut into pieces, the same requests come of it, or the same
/// refusal; and no more is held than may be.
///
/// Two bytes of how long the pieces are, and all that is sent.
fn receive(data: &[u8]) -> usize {
    let Some((head, sent)) = data.split_at_checked(2) else {
        return 0;
    };
    let size = usize::from(u16::from_le_bytes([head[0], head[1]])).max(1);
    assert_eq!(received(sent, size), received(sent, sent.len().max(1)));
    0
}

/// The digests and sizes of the requests, and whether all was understood.
fn received(sent: &[u8], size: usize) -> (Vec<(Vec<u8>, u64)>, bool) {
    let digest_of = |store: &Store| {
        let whole = || Kind::Blake3.of(&store.dataset);
        store.digest.clone().unwrap_or_else(whole)
    };
    let limits = Limits {
        pdu: 1 << 16,
        dataset: 48 << 10,
        memory: 4096,
    };
    let mut receiver = Receiver::new(vec![1, 3], limits, Kind::Blake3);
    let (mut found, mut taken) = (Vec::new(), 0);
    for mut piece in sent.chunks(size) {
        while !piece.is_empty() {
            let room = receiver.room();
            let count = room.len().min(piece.len());
            room[..count].copy_from_slice(&piece[..count]);
            if receiver.filled(count).is_err() {
                return (found, false);
            }
            piece = &piece[count..];
        }
        loop {
            match receiver.step() {
                Ok(Step::Hungry) => break,
                Ok(Step::Pass(pdu)) => assert!(pdu.len() <= sent.len() + 12),
                Ok(Step::Full) => taken += receiver.take().len() as u64,
                Ok(Step::Store(store)) => {
                    taken += store.dataset.len() as u64;
                    assert_eq!(std::mem::take(&mut taken), store.size);
                    assert!(store.size <= limits.dataset);
                    found.push((digest_of(&store), store.size));
                }
                Err(_) => return (found, false),
            }
        }
        let held = receiver.arriving().map_or(0, |store| store.dataset.len());
        assert!(held <= limits.memory);
    }
    (found, true)
}
