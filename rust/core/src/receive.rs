//! Receiving: from the bytes of an association to whole C-STORE requests.
//!
//! The problem: most of what a node receives is P-DATA-TF (PS3.8 section 9.3.5) that carries C-STORE
//! requests (PS3.7 section 9.1.1), and nothing in it may be trusted. [`Receiver`] takes bytes as they
//! come and gives whole requests, with the digest of a dataset that was taken in parts; every other
//! message and PDU is passed on as it came. It reads nothing itself: [`Receiver::room`] and [`Receiver::filled`] put bytes
//! in, [`Receiver::step`] takes requests out. What it holds is bounded by [`Limits`].

use std::collections::VecDeque;
use std::mem;

use crate::bytes::{Bytes, Input};
use crate::digest::{Digest, Kind};
use crate::error::{Error, Result};

/// P-DATA-TF (PS3.8 section 9.3.5).
const DATA: u8 = 0x04;
/// The last of the seven PDU types (A-ABORT).
const LAST_TYPE: u8 = 0x07;
/// C-STORE-RQ (PS3.7 section 9.3.1.1).
const C_STORE_RQ: u16 = 0x0001;
/// Command Data Set Type: no dataset follows (PS3.7 section E.1).
const NO_DATASET: u16 = 0x0101;
/// A command set is small, and so is every PDU but P-DATA-TF once an association is there.
const MOST_COMMAND: usize = 64 << 10;
/// The dataset of a message that is not a C-STORE: a list of tens of thousands of instances.
const MOST_OTHER: usize = 4 << 20;
/// From so many missing bytes of a fragment on they are read to their place.
const DIRECT: usize = 16 << 10;
/// Of fragments from so many bytes on only the beginning is read before it is known where the rest belongs.
const LONG: usize = if cfg!(debug_assertions) {
    // Within reach of what is fuzzed.
    32 << 10
} else {
    64 << 10
};
/// So much is read beyond what is known to be there.
const AHEAD: usize = 512;

/// What a stranger may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most bytes of a P-DATA-TF PDU.
    pub pdu: u32,
    /// Most bytes of a dataset.
    pub dataset: u64,
    /// Most bytes of a dataset in memory; of a larger one its owner takes parts.
    pub memory: usize,
}

/// What came of the bytes so far.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing whole yet: put more bytes in.
    Hungry,
    /// A PDU for somebody else.
    Pass(Vec<u8>),
    /// As many bytes of a dataset as may be in memory: take them with [`Receiver::take`].
    Full,
    /// A whole request.
    Store(Box<Store>),
}

/// A C-STORE request and its dataset.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Store {
    /// Presentation context ID.
    pub context: u8,
    /// (0000,0110)
    pub message_id: u16,
    /// (0000,0002), as it came without padding.
    pub sop_class_uid: Vec<u8>,
    /// (0000,1000), as it came without padding.
    pub sop_instance_uid: Vec<u8>,
    /// The dataset; of a large one, what was not taken before.
    pub dataset: Bytes,
    /// Bytes of the whole dataset.
    pub size: u64,
    /// The digest of the whole dataset, where it was begun before.
    pub digest: Option<Vec<u8>>,
}

#[derive(Debug, Clone, Copy)]
enum Place {
    /// Before the header of a PDU.
    Pdu,
    /// In a P-DATA-TF with so many bytes left, before a presentation data value.
    Item { left: usize },
    /// In a fragment with so many bytes left, and in its PDU with `left` after it.
    Fragment {
        left: usize,
        rest: usize,
        is_last: bool,
    },
}

enum Message {
    None,
    /// A command set that is not whole yet.
    Command(Vec<u8>),
    /// The dataset of a C-STORE request, and the digest of its bytes so far where there is one.
    Dataset(Box<Store>, Option<Along>),
    /// The dataset of another message.
    Other(Vec<u8>),
}

/// The digest of what was taken, and of the first `count` bytes of what is in memory.
struct Along {
    digest: Digest,
    count: usize,
}

impl Along {
    fn new(kind: Kind) -> Self {
        Along {
            digest: Digest::new(kind),
            count: 0,
        }
    }

    fn update(&mut self, dataset: &[u8]) {
        self.digest.update(&dataset[self.count..]);
        self.count = dataset.len();
    }
}

/// The parser of one association.
pub struct Receiver {
    contexts: Vec<u8>,
    limits: Limits,
    kind: Kind,
    input: Input,
    /// `input[start..end]` was read and not looked at yet.
    start: usize,
    end: usize,
    place: Place,
    /// Whether datasets come in long fragments.
    is_long: bool,
    context: u8,
    message: Message,
    passed: VecDeque<Vec<u8>>,
    ready: Option<Box<Store>>,
    is_full: bool,
}

impl Receiver {
    /// `contexts` are the IDs of the accepted presentation contexts; `kind` is that of the
    /// digests.
    #[must_use]
    pub fn new(contexts: Vec<u8>, limits: Limits, kind: Kind) -> Self {
        Receiver {
            contexts,
            limits,
            kind,
            input: Input::default(),
            start: 0,
            end: 0,
            place: Place::Pdu,
            is_long: false,
            context: 0,
            message: Message::None,
            passed: VecDeque::new(),
            ready: None,
            is_full: false,
        }
    }

    /// Where the next bytes that arrive belong; tell with [`Receiver::filled`] how many came.
    pub fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if let (Place::Fragment { left, .. }, Message::Dataset(store, _)) =
                (&self.place, &mut self.message)
                && *left >= DIRECT
            {
                // Read straight to the end of the dataset.
                return store.dataset.room((*left).min(Input::SIZE));
            }
        }
        self.input.begin();
        if self.start > 0 && self.end == self.input.len() {
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.end == self.input.len() {
            // Only a PDU for somebody else is ever this long.
            self.input.grow();
        }
        let most = match self.place {
            _ if !self.is_long => usize::MAX,
            Place::Fragment { left, .. } => left + AHEAD,
            _ => AHEAD,
        };
        let end = self.input.len().min(self.end.saturating_add(most));
        &mut self.input[self.end..end]
    }

    /// So many bytes were put into the last [`Receiver::room`].
    ///
    /// # Errors
    /// As [`Receiver::step`].
    pub fn filled(&mut self, count: usize) -> Result<()> {
        if self.start == self.end
            && let (Place::Fragment { left, .. }, Message::Dataset(store, _)) =
                (&mut self.place, &mut self.message)
            && *left >= DIRECT
        {
            store.dataset.filled(count);
            store.size += count as u64;
            *left -= count;
            return self.check_size();
        }
        self.end += count;
        Ok(())
    }

    /// What the bytes so far give.
    ///
    /// # Errors
    /// `InvalidDicom` for bytes that break the protocol or a limit: the association has to be aborted.
    pub fn step(&mut self) -> Result<Step> {
        loop {
            if let Some(pdu) = self.passed.pop_front() {
                return Ok(Step::Pass(pdu));
            }
            if let Some(store) = self.ready.take() {
                return Ok(Step::Store(store));
            }
            if mem::take(&mut self.is_full) {
                return Ok(Step::Full);
            }
            let available = self.end - self.start;
            match self.place {
                Place::Pdu => {
                    if available < 6 {
                        return Ok(Step::Hungry);
                    }
                    let head = &self.input[self.start..self.start + 6];
                    let (kind, length) = (head[0], u32_at(head, 2));
                    if kind == DATA {
                        if length < 6 {
                            return Err(Error::invalid("a P-DATA-TF PDU without a value"));
                        }
                        if length > self.limits.pdu {
                            return Err(Error::invalid(format!(
                                "a P-DATA-TF PDU of {length} bytes, more than {}",
                                self.limits.pdu
                            )));
                        }
                        self.start += 6;
                        self.place = Place::Item {
                            left: length as usize,
                        };
                    } else if kind == 0 || kind > LAST_TYPE || length as usize > MOST_COMMAND {
                        return Err(Error::invalid(format!(
                            "a PDU of type 0x{kind:02X} and {length} bytes"
                        )));
                    } else {
                        let whole = 6 + length as usize;
                        if available < whole {
                            return Ok(Step::Hungry);
                        }
                        let pdu = self.input[self.start..self.start + whole].to_vec();
                        self.start += whole;
                        return Ok(Step::Pass(pdu));
                    }
                }
                Place::Item { left: 0 } => self.place = Place::Pdu,
                Place::Item { left } => {
                    if left < 6 {
                        return Err(Error::invalid("a presentation data value that is cut off"));
                    }
                    if available < 6 {
                        return Ok(Step::Hungry);
                    }
                    self.begin_fragment(left)?;
                }
                Place::Fragment {
                    left: 0,
                    rest,
                    is_last,
                } => {
                    self.place = Place::Item { left: rest };
                    if is_last {
                        self.end_part()?;
                    }
                }
                Place::Fragment {
                    left,
                    rest,
                    is_last,
                } => {
                    let count = left.min(available);
                    if count == 0 {
                        return Ok(Step::Hungry);
                    }
                    self.start += count;
                    self.place = Place::Fragment {
                        left: left - count,
                        rest,
                        is_last,
                    };
                    self.add(self.start - count, count)?;
                }
            }
        }
    }

    /// The bytes of the dataset that are in memory now, to be kept elsewhere.
    pub fn take(&mut self) -> Bytes {
        match &mut self.message {
            Message::Dataset(store, along) => {
                let along = along.get_or_insert_with(|| Along::new(self.kind));
                along.update(&store.dataset);
                along.count = 0;
                mem::take(&mut store.dataset)
            }
            _ => Bytes::default(),
        }
    }

    /// Make the digest of what has come while the rest is on its way.
    pub fn digest_along(&mut self) {
        if let Message::Dataset(store, along) = &mut self.message {
            along
                .get_or_insert_with(|| Along::new(self.kind))
                .update(&store.dataset);
        }
    }

    /// The request whose dataset is arriving.
    #[must_use]
    pub fn arriving(&self) -> Option<&Store> {
        match &self.message {
            Message::Dataset(store, _) => Some(store),
            _ => None,
        }
    }

    /// Whether a message has begun and is not whole.
    #[must_use]
    pub fn is_within(&self) -> bool {
        !matches!((&self.place, &self.message), (Place::Pdu, Message::None))
            || self.start != self.end
    }

    /// The header of a presentation data value (PS3.8 section 9.3.5.1 and E.2).
    fn begin_fragment(&mut self, left: usize) -> Result<()> {
        let head = &self.input[self.start..self.start + 6];
        let (length, context, control) = (u32_at(head, 0) as usize, head[4], head[5]);
        if length < 2 || length > left - 4 {
            return Err(Error::invalid(format!(
                "a presentation data value of {length} bytes where {} are left",
                left - 4
            )));
        }
        self.start += 6;
        let (is_command, is_last) = (control & 1 != 0, control & 2 != 0);
        if length == 2 && !is_last {
            return Err(Error::invalid("an empty fragment"));
        }
        if !self.contexts.contains(&context) {
            return Err(Error::invalid(format!(
                "presentation context {context}, which was not accepted"
            )));
        }
        match (&self.message, is_command) {
            (Message::None, true) => {
                self.context = context;
                self.message = Message::Command(Vec::new());
            }
            (Message::Command(_), true) | (Message::Dataset(..) | Message::Other(_), false) => {
                if context != self.context {
                    return Err(Error::invalid(format!(
                        "presentation context {context} within a message of context {}",
                        self.context
                    )));
                }
            }
            (Message::None | Message::Command(_), false) => {
                return Err(Error::invalid("a dataset without its command"));
            }
            (Message::Dataset(..) | Message::Other(_), true) => {
                return Err(Error::invalid(
                    "a command within the dataset of another one",
                ));
            }
        }
        // How long the last one is tells nothing about the others.
        if !is_command && (length >= LONG || !is_last) {
            self.is_long = length >= LONG;
        }
        self.place = Place::Fragment {
            left: length - 2,
            rest: left - 4 - length,
            is_last,
        };
        Ok(())
    }

    /// The bytes of a fragment at `from`.
    fn add(&mut self, from: usize, count: usize) -> Result<()> {
        let bytes = &self.input[from..from + count];
        match &mut self.message {
            Message::None => {}
            Message::Command(command) => {
                if command.len() + count > MOST_COMMAND {
                    return Err(Error::invalid("a command set without end"));
                }
                command.extend_from_slice(bytes);
            }
            Message::Dataset(store, _) => {
                store.dataset.push(bytes);
                store.size += count as u64;
                return self.check_size();
            }
            Message::Other(dataset) => {
                if dataset.len() + count > MOST_OTHER {
                    return Err(Error::invalid("a message without end"));
                }
                dataset.extend_from_slice(bytes);
            }
        }
        Ok(())
    }

    fn check_size(&mut self) -> Result<()> {
        let Message::Dataset(store, _) = &self.message else {
            return Ok(());
        };
        if store.size > self.limits.dataset {
            return Err(Error::invalid(format!(
                "a dataset of more than {} bytes",
                self.limits.dataset
            )));
        }
        self.is_full = store.dataset.len() >= self.limits.memory;
        Ok(())
    }

    /// The last fragment of a command or of a dataset has ended.
    fn end_part(&mut self) -> Result<()> {
        match mem::replace(&mut self.message, Message::None) {
            Message::None => {}
            Message::Command(bytes) => {
                let command = Command::parse(&bytes)?;
                if command.field != C_STORE_RQ {
                    self.passed.push_back(data_pdu(self.context, 3, &bytes));
                    if command.has_dataset {
                        self.message = Message::Other(Vec::new());
                    }
                    return Ok(());
                }
                let store = Box::new(Store {
                    context: self.context,
                    message_id: command.message_id,
                    sop_class_uid: command.sop_class_uid.to_vec(),
                    sop_instance_uid: command.sop_instance_uid.to_vec(),
                    ..Store::default()
                });
                self.message = Message::Dataset(store, None);
                if !command.has_dataset {
                    self.end_part()?;
                }
            }
            Message::Dataset(mut store, along) => {
                store.digest = along.map(|mut along| {
                    along.update(&store.dataset);
                    along.digest.finish()
                });
                self.is_full = false;
                self.ready = Some(store);
            }
            // As one PDU, in however many pieces it came: each costs its reader the same.
            Message::Other(dataset) => {
                self.passed.push_back(data_pdu(self.context, 2, &dataset));
            }
        }
        Ok(())
    }
}

/// What of a command set counts here (PS3.7 section E.1); implicit VR little endian.
struct Command<'a> {
    field: u16,
    message_id: u16,
    has_dataset: bool,
    sop_class_uid: &'a [u8],
    sop_instance_uid: &'a [u8],
}

impl<'a> Command<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self> {
        let mut found = Command {
            field: 0,
            message_id: 0,
            has_dataset: false,
            sop_class_uid: &[],
            sop_instance_uid: &[],
        };
        let mut seen = [false; 2];
        let mut left = bytes;
        while !left.is_empty() {
            let Some((head, rest)) = left.split_at_checked(8) else {
                return Err(Error::invalid("a command set that is cut off"));
            };
            let (group, element) = (u16_le(head, 0), u16_le(head, 2));
            let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
            let Some((value, rest)) = rest.split_at_checked(length as usize) else {
                return Err(Error::invalid("a command set with a value that is cut off"));
            };
            if group != 0 {
                return Err(Error::invalid("a command set with an element of a dataset"));
            }
            left = rest;
            match (element, value.len()) {
                (0x0002, _) => found.sop_class_uid = trimmed(value),
                (0x1000, _) => found.sop_instance_uid = trimmed(value),
                (0x0100, 2) => (found.field, seen[0]) = (u16_le(value, 0), true),
                (0x0110, 2) => found.message_id = u16_le(value, 0),
                (0x0800, 2) => {
                    (found.has_dataset, seen[1]) = (u16_le(value, 0) != NO_DATASET, true);
                }
                _ => {}
            }
        }
        if seen != [true, true] {
            return Err(Error::invalid(
                "a command set without CommandField or CommandDataSetType",
            ));
        }
        Ok(found)
    }
}

/// A P-DATA-TF PDU of one fragment.
#[must_use]
pub fn data_pdu(context: u8, control: u8, bytes: &[u8]) -> Vec<u8> {
    // What is passed on is far smaller than 4 GiB.
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX - 6);
    let mut pdu = Vec::with_capacity(bytes.len() + 12);
    pdu.extend_from_slice(&[DATA, 0]);
    pdu.extend_from_slice(&(length + 6).to_be_bytes());
    pdu.extend_from_slice(&(length + 2).to_be_bytes());
    pdu.extend_from_slice(&[context, control]);
    pdu.extend_from_slice(bytes);
    pdu
}

impl Store {
    /// The C-STORE-RSP (PS3.7 section 9.3.1.2) as one PDU; `comment` of at most 64 characters and
    /// `offending` (a tag) are left out where they are empty and 0.
    #[must_use]
    pub fn response(&self, status: u16, comment: &str, offending: u32) -> Vec<u8> {
        let mut body = Vec::with_capacity(256);
        element(&mut body, 0x0002, &padded(&self.sop_class_uid, 0));
        element(&mut body, 0x0100, &0x8001_u16.to_le_bytes());
        element(&mut body, 0x0120, &self.message_id.to_le_bytes());
        element(&mut body, 0x0800, &NO_DATASET.to_le_bytes());
        element(&mut body, 0x0900, &status.to_le_bytes());
        if offending != 0 {
            let [a, b, c, d] = offending.to_be_bytes();
            element(&mut body, 0x0901, &[b, a, d, c]);
        }
        if !comment.is_empty() {
            element(&mut body, 0x0902, &padded(comment.as_bytes(), b' '));
        }
        element(&mut body, 0x1000, &padded(&self.sop_instance_uid, 0));
        let mut command = Vec::with_capacity(body.len() + 12);
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        element(&mut command, 0x0000, &length.to_le_bytes());
        command.extend_from_slice(&body);
        data_pdu(self.context, 3, &command)
    }
}

fn element(into: &mut Vec<u8>, number: u16, value: &[u8]) {
    into.extend_from_slice(&[0, 0]);
    into.extend_from_slice(&number.to_le_bytes());
    let length = u32::try_from(value.len()).unwrap_or(u32::MAX);
    into.extend_from_slice(&length.to_le_bytes());
    into.extend_from_slice(value);
}

/// At most 64 bytes, which UIDs and comments have: what a stranger sends instead is not given back whole.
fn padded(value: &[u8], pad: u8) -> Vec<u8> {
    let mut even = value[..value.len().min(64)].to_vec();
    if !even.len().is_multiple_of(2) {
        even.push(pad);
    }
    even
}

/// A UID without its padding: NUL, or the blanks of careless writers.
fn trimmed(value: &[u8]) -> &[u8] {
    let end = value.iter().rposition(|byte| !matches!(byte, 0 | b' '));
    &value[..end.map_or(0, |last| last + 1)]
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u16_le(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        pdu: 1 << 20,
        dataset: 1 << 20,
        memory: 1 << 20,
    };
    const UID: &[u8] = b"1.2.3.4\0";

    fn command(field: u16, has_dataset: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        element(&mut bytes, 0x0002, b"1.2.840.10008.5.1.4.1.1.2\0");
        element(&mut bytes, 0x0100, &field.to_le_bytes());
        element(&mut bytes, 0x0110, &7_u16.to_le_bytes());
        let kind = if has_dataset { 1 } else { NO_DATASET };
        element(&mut bytes, 0x0800, &kind.to_le_bytes());
        element(&mut bytes, 0x1000, UID);
        bytes
    }

    fn value(context: u8, control: u8, bytes: &[u8]) -> Vec<u8> {
        data_pdu(context, control, bytes).split_off(6)
    }

    fn pdu(values: &[Vec<u8>]) -> Vec<u8> {
        let body = values.concat();
        let mut pdu = vec![DATA, 0];
        pdu.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
        pdu.extend(body);
        pdu
    }

    fn dataset(length: usize) -> Vec<u8> {
        (0..length).map(|k| (k * 7 % 251) as u8).collect()
    }

    /// All that comes of these bytes, given in pieces of a size; how much was held at most.
    fn steps(bytes: &[u8], size: usize, limits: Limits) -> Result<(Vec<Step>, Vec<u8>, usize)> {
        let mut receiver = Receiver::new(vec![1, 3], limits, Kind::Sha256);
        let (mut found, mut taken, mut most) = (Vec::new(), Vec::new(), 0);
        let mut drain = |receiver: &mut Receiver| -> Result<()> {
            loop {
                most = most.max(receiver.arriving().map_or(0, |one| one.dataset.len()));
                match receiver.step()? {
                    Step::Hungry => return Ok(()),
                    Step::Full => taken.extend_from_slice(&receiver.take()),
                    step => found.push(step),
                }
            }
        };
        for mut piece in bytes.chunks(size) {
            while !piece.is_empty() {
                let room = receiver.room();
                let count = room.len().min(piece.len());
                room[..count].copy_from_slice(&piece[..count]);
                receiver.filled(count)?;
                piece = &piece[count..];
            }
            drain(&mut receiver)?;
        }
        Ok((found, taken, most))
    }

    fn stored(step: &Step) -> &Store {
        match step {
            Step::Store(store) => store,
            other => panic!("expected a request, found {other:?}"),
        }
    }

    fn refused(bytes: &[u8]) {
        for size in [1, 7, bytes.len()] {
            assert!(steps(bytes, size, LIMITS).is_err());
        }
    }

    #[test]
    fn a_request_is_the_same_however_its_bytes_come() {
        let data = dataset(70_000);
        let mut bytes = data_pdu(3, 3, &command(C_STORE_RQ, true));
        for (k, part) in data.chunks(30_001).enumerate() {
            bytes.extend(data_pdu(3, if k == 2 { 2 } else { 0 }, part));
        }
        for size in [1, 2, 5, 6, 100, 16_384, 65_536, bytes.len()] {
            let (found, _, _) = steps(&bytes, size, LIMITS).unwrap();
            let store = stored(&found[0]);
            assert_eq!(&store.dataset[..], data);
            assert_eq!(store.digest, None);
            assert_eq!((store.context, store.message_id), (3, 7));
            assert_eq!(store.sop_instance_uid, b"1.2.3.4");
            assert_eq!((found.len(), store.size), (1, 70_000));
        }
    }

    #[test]
    fn of_long_fragments_hardly_more_than_the_head_is_read_ahead() {
        let data = dataset(290_000);
        let send = |length: usize| {
            let mut bytes = data_pdu(3, 3, &command(C_STORE_RQ, true));
            for (k, part) in data.chunks(length).enumerate() {
                let is_last = (k + 1) * length >= data.len();
                bytes.extend(data_pdu(3, if is_last { 2 } else { 0 }, part));
            }
            bytes
        };
        let bytes = [send(90_000), send(90_000), send(1000), send(1000)].concat();
        let mut receiver = Receiver::new(vec![3], LIMITS, Kind::Sha256);
        let (mut left, mut ahead, mut copied) = (&bytes[..], 0, Vec::new());
        while copied.len() < 4 {
            match receiver.step().unwrap() {
                Step::Hungry => {
                    let room = receiver.room();
                    let count = room.len().min(left.len());
                    room[..count].copy_from_slice(&left[..count]);
                    receiver.filled(count).unwrap();
                    ahead += receiver.end - receiver.start;
                    left = &left[count..];
                }
                Step::Store(store) => {
                    assert_eq!(&store.dataset[..], data);
                    copied.push(std::mem::take(&mut ahead));
                }
                other => panic!("{other:?}"),
            }
        }
        // The first one was not known to be long, and the third to be short.
        assert!(copied[1] < 24_000, "{copied:?}");
        assert!(copied[0] > 90_000 && copied[2] > 90_000, "{copied:?}");
        assert!(left.is_empty());
        for size in [1, 500, 513, 65_536, 131_072] {
            let (found, _, _) = steps(&bytes, size, LIMITS).unwrap();
            assert_eq!(found.len(), 4);
            assert!(found.iter().all(|one| stored(one).dataset[..] == data));
        }
    }

    #[test]
    fn command_and_dataset_in_one_pdu_and_in_fragments_of_one_byte() {
        let (head, data) = (command(C_STORE_RQ, true), dataset(300));
        let ends = |parts: &[u8], kind: u8| -> Vec<Vec<u8>> {
            let last = parts.len() - 1;
            let one =
                |(k, byte): (usize, &u8)| value(1, kind | if k == last { 2 } else { 0 }, &[*byte]);
            parts.iter().enumerate().map(one).collect()
        };
        let mut values = ends(&head, 1);
        values.extend(ends(&data, 0));
        let bytes = pdu(&values);
        for size in [1, 3, 1000, bytes.len()] {
            let (found, _, _) = steps(&bytes, size, LIMITS).unwrap();
            assert_eq!(&stored(&found[0]).dataset[..], data);
        }
    }

    #[test]
    fn a_response_is_short_whatever_came() {
        let store = Store {
            sop_class_uid: vec![b'1'; 60_000],
            sop_instance_uid: vec![b'2'; 60_000],
            ..Store::default()
        };
        assert!(store.response(0x0117, &"x".repeat(1000), 0x0008_0018).len() < 400);
    }

    #[test]
    fn an_empty_last_fragment_ends_a_message() {
        let bytes = [
            data_pdu(1, 3, &command(C_STORE_RQ, true)),
            data_pdu(1, 0, b"abc"),
            data_pdu(1, 2, &[]),
        ]
        .concat();
        let (found, _, _) = steps(&bytes, bytes.len(), LIMITS).unwrap();
        assert_eq!(&stored(&found[0]).dataset[..], b"abc");
        // Also of a message for somebody else, who gets it as one PDU.
        for parts in [&[&b"abc"[..], &[]][..], &[&[][..]]] {
            let mut bytes = data_pdu(1, 3, &command(0x0020, true));
            for (k, part) in parts.iter().enumerate() {
                let last = k + 1 == parts.len();
                bytes.extend(data_pdu(1, if last { 2 } else { 0 }, part));
            }
            let (found, _, _) = steps(&bytes, 1, LIMITS).unwrap();
            let whole = Step::Pass(data_pdu(1, 2, &parts.concat()));
            assert_eq!((found.len(), found.last()), (2, Some(&whole)));
        }
    }

    #[test]
    fn what_is_no_store_is_passed_on_in_order() {
        let release = vec![5, 0, 0, 0, 0, 4, 0, 0, 0, 0];
        let bytes = [
            data_pdu(1, 3, &command(0x0030, false)),
            data_pdu(3, 3, &command(C_STORE_RQ, true)),
            data_pdu(3, 2, b"data"),
            data_pdu(1, 3, &command(0x0020, true)),
            data_pdu(1, 0, b"of "),
            data_pdu(1, 2, b"find"),
            release.clone(),
        ]
        .concat();
        for size in [1, 10, bytes.len()] {
            let (found, _, _) = steps(&bytes, size, LIMITS).unwrap();
            assert_eq!(
                found[0],
                Step::Pass(data_pdu(1, 3, &command(0x0030, false)))
            );
            assert_eq!(&stored(&found[1]).dataset[..], b"data");
            assert_eq!(found.last(), Some(&Step::Pass(release.clone())));
        }
    }

    #[test]
    fn a_request_without_a_dataset_is_empty() {
        let bytes = data_pdu(1, 3, &command(C_STORE_RQ, false));
        let (found, _, _) = steps(&bytes, bytes.len(), LIMITS).unwrap();
        assert_eq!(stored(&found[0]).size, 0);
    }

    #[test]
    fn no_more_is_held_than_may_be_and_nothing_of_it_is_lost() {
        let limits = Limits {
            memory: 10_000,
            ..LIMITS
        };
        let data = dataset(200_000);
        let mut bytes = data_pdu(1, 3, &command(C_STORE_RQ, true));
        for part in data.chunks(50_000) {
            bytes.extend(data_pdu(1, 0, part));
        }
        bytes.extend(data_pdu(1, 2, &[]));
        for size in [1000, 4096] {
            let (found, mut taken, most) = steps(&bytes, size, limits).unwrap();
            let store = stored(&found[0]);
            taken.extend_from_slice(&store.dataset);
            assert_eq!(taken, data);
            assert_eq!(store.digest, Some(Kind::Sha256.of(&data)));
            assert!(most < limits.memory + 2 * size, "{most}");
        }
    }

    #[test]
    fn what_breaks_the_protocol_or_a_limit_is_an_error() {
        let head = data_pdu(1, 3, &command(C_STORE_RQ, true));
        refused(&[4, 0, 0xFF, 0xFF, 0xFF, 0xFF]);
        refused(&[5, 0, 0xFF, 0xFF, 0xFF, 0xFF]);
        refused(&[0, 0, 0, 0, 0, 0]);
        refused(&[8, 0, 0, 0, 0, 4, 0, 0, 0, 0]);
        refused(&[4, 0, 0, 0, 0, 0]);
        refused(&[4, 0, 0, 0, 0, 3, 0, 0, 0]);
        refused(&pdu(&[value(5, 3, b"x")]));
        refused(&pdu(&[value(1, 0, b"x")]));
        refused(&pdu(&[value(1, 1, &[])]));
        refused(&pdu(&[vec![0, 0, 1, 0, 1, 3, 0]]));
        refused(&pdu(&[value(1, 3, b"noise and noise")]));
        refused(&[&head[..], &head[..]].concat());
        refused(&[&head[..], &data_pdu(3, 2, b"x")].concat());
        let command_without_end = data_pdu(1, 1, &dataset(60_000));
        refused(&[&command_without_end[..], &command_without_end].concat());
        let half = dataset(600_000);
        refused(&[&head[..], &data_pdu(1, 0, &half), &data_pdu(1, 0, &half)].concat());
    }

    #[test]
    fn a_response_is_one_even_pdu_whatever_it_answers() {
        let store = Store {
            context: 3,
            message_id: 9,
            sop_class_uid: b"1.2.3".to_vec(),
            sop_instance_uid: vec![0xFF; 65],
            ..Store::default()
        };
        for comment in ["", "x", &"y".repeat(100)] {
            let pdu = store.response(0xA700, comment, 0x0010_0020);
            assert_eq!(u32_at(&pdu, 2) as usize, pdu.len() - 6);
            assert_eq!((pdu[10], pdu[11]), (3, 3));
            let command = Command::parse(&pdu[12..]).unwrap();
            assert_eq!((command.field, command.has_dataset), (0x8001, false));
            assert_eq!(pdu.len() % 2, 0);
        }
    }
}
