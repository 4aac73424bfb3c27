//! The least that receiving takes: `receive_floor FOLDER power|process` prints its port and takes C-STORE requests.
//!
//! The problem: how far is a node from what the machine can do? This keeps what a node promises (each image whole in
//! a file with its digest, its name in a folder, and 8 KiB in a log, with `power` all of it flushed, over concurrent
//! associations in one commit) with the node's parser and files, and does nothing else. It never copies the log anywhere, has no interpreter, looks
//! at no header, routes nothing, and believes its peer: never use it but to measure. It ends with its standard input.

use std::error::Error;
use std::fs::{File, create_dir_all};
use std::hint::black_box;
use std::io::{Read, Seek, Write, stdin};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use dicomnode_core::digest::Kind;
use dicomnode_core::hashing::{self, Coming};
use dicomnode_core::incoming::{Incoming, link};
use dicomnode_core::receive::{Limits, Receiver, Step};
use rustix::fs::fdatasync;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Two pages of SQLite's log with their headers.
const ROW: usize = 2 * (4096 + 24);
/// Where the items of an association request begin, without the head of the PDU.
const ITEMS: usize = 68;

/// How large the log is before the first row, as SQLite's comes to be: who makes it longer has its length flushed, too.
const LOG: usize = 1000 * (4096 + 24);

/// A log that several write to, and one flushes for all that wait.
struct Log {
    file: Mutex<File>,
    /// How many rows wait, and how many have waited before the last commit.
    waiting: Mutex<(u64, u64)>,
}

impl Log {
    fn commit(&self, flush: bool) -> Outcome<()> {
        let own = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.0 += 1;
            waiting.0
        };
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, done) = *self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if done >= own {
            return Ok(());
        }
        let rows = vec![1; ROW * usize::try_from(last - done)?];
        if file.stream_position()? + rows.len() as u64 > LOG as u64 {
            file.rewind()?;
        }
        file.write_all(&rows)?;
        if flush {
            fdatasync(&*file)?;
        }
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .1 = last;
        Ok(())
    }
}

fn item(kind: u8, value: &[u8]) -> Outcome<Vec<u8>> {
    let length = u16::try_from(value.len())?.to_be_bytes();
    Ok([&[kind, 0], &length[..], value].concat())
}

/// Type and value of each item (PS3.8 section 9.3).
fn items(mut bytes: &[u8]) -> Vec<(u8, &[u8])> {
    let mut found = Vec::new();
    while let [kind, _, high, low, rest @ ..] = bytes {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
        found.push((*kind, &rest[..length]));
        bytes = &rest[length..];
    }
    found
}

/// Accept the first transfer syntax of each context; the contexts.
fn negotiate(peer: &mut TcpStream) -> Outcome<Vec<(u8, String)>> {
    let mut head = [0; 6];
    peer.read_exact(&mut head)?;
    let length = u32::from_be_bytes([head[2], head[3], head[4], head[5]]);
    let mut request = vec![0; usize::try_from(length)?];
    peer.read_exact(&mut request)?;
    let (mut contexts, mut answer) = (Vec::new(), Vec::new());
    for (kind, value) in items(request.get(ITEMS..).unwrap_or_default()) {
        if kind == 0x10 {
            answer.extend(item(kind, value)?);
        } else if kind == 0x20 && value.len() > 4 {
            let syntaxes = items(&value[4..]);
            let first = syntaxes.iter().find(|one| one.0 == 0x40);
            let (_, syntax) = first.ok_or("a context without a transfer syntax")?;
            contexts.push((value[0], String::from_utf8_lossy(syntax).into_owned()));
            let accepted = [&[value[0], 0, 0, 0], &item(0x40, syntax)?[..]].concat();
            answer.extend(item(0x21, &accepted)?);
        }
    }
    let largest = item(0x51, &131_072_u32.to_be_bytes())?;
    answer.extend(item(0x50, &[largest, item(0x52, b"2.25.1")?].concat())?);
    let length = u32::try_from(ITEMS + answer.len())?.to_be_bytes();
    peer.write_all(&[&[2, 0], &length[..], &request[..ITEMS], &answer].concat())?;
    Ok(contexts)
}

fn serve(mut peer: TcpStream, root: &Path, number: usize, flush: bool, log: &Log) -> Outcome<()> {
    peer.set_nodelay(true)?;
    let contexts = negotiate(&mut peer)?;
    let kind = if flush { Kind::Sha256 } else { Kind::Blake3 };
    let limits = Limits {
        pdu: 132_096,
        dataset: 1 << 30,
        memory: 1 << 30,
    };
    let numbers = contexts.iter().map(|one| one.0).collect();
    let mut receiver = Receiver::new(numbers, limits, kind);
    let mut incoming = Incoming {
        folder: root.join("incoming"),
        least_free: 0,
        title: "FLOOR".to_owned(),
        syntaxes: contexts,
        spare: None,
    };
    let (mut growing, mut written, mut count) = (None, 0, 0_u32);
    loop {
        match receiver.step()? {
            Step::Hungry => {
                if let Some(store) = receiver.arriving()
                    && !store.dataset.is_empty()
                {
                    if growing.is_none() {
                        growing = incoming.begin(store)?;
                    }
                    let file = growing.as_mut().ok_or("an image without a UID")?;
                    let more = incoming.write(file, &store.dataset[written..], false)?;
                    written += more;
                    if more > 0 && kind == Kind::Blake3 {
                        receiver.digest_along();
                    }
                }
                let read = peer.read(receiver.room())?;
                receiver.filled(read)?;
                if read == 0 {
                    return Ok(());
                }
            }
            Step::Store(mut store) => {
                let taken = match growing.take() {
                    Some(file) => Some(file),
                    None => incoming.begin(&store)?,
                };
                let mut file = taken.ok_or("an image without a UID")?;
                incoming.write(&mut file, &store.dataset[written..], true)?;
                written = 0;
                let dataset = Arc::new(std::mem::take(&mut store.dataset));
                let coming = match store.digest.take() {
                    None => hashing::begin(kind, &dataset),
                    Some(digest) => Coming::known(kind, digest),
                };
                let name = format!("Image_CT_{number}_{count}.dcm");
                count += 1;
                link(
                    file.as_fd(),
                    file.start() + store.size,
                    &root.join("patient/images"),
                    &name,
                    flush,
                )?;
                black_box(coming.wait(&dataset));
                log.commit(flush)?;
                peer.write_all(&store.response(0, "", 0))?;
            }
            // A request for a release.
            Step::Pass(pdu) if pdu[0] == 5 => {
                peer.write_all(&[6, 0, 0, 0, 0, 4, 0, 0, 0, 0])?;
                let _ = peer.read(&mut [0]);
                return Ok(());
            }
            Step::Pass(_) | Step::Full => return Err("not an image".into()),
        }
    }
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, root, durability] = arguments.as_slice() else {
        return Err("usage: receive_floor FOLDER power|process".into());
    };
    let (root, flush) = (PathBuf::from(root), durability == "power");
    create_dir_all(root.join("incoming"))?;
    create_dir_all(root.join("patient/images"))?;
    let path = root.join("log");
    let mut file = File::create(path)?;
    file.write_all(&vec![0; LOG])?;
    file.sync_all()?;
    file.rewind()?;
    let log = Arc::new(Log {
        file: Mutex::new(file),
        waiting: Mutex::default(),
    });
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?.port());
    thread::spawn(|| {
        let _ = stdin().read(&mut [0]);
        std::process::exit(0);
    });
    for (number, peer) in listener.incoming().enumerate() {
        let (peer, root, log) = (peer?, root.clone(), Arc::clone(&log));
        thread::spawn(move || {
            if let Err(error) = serve(peer, &root, number, flush, &log) {
                eprintln!("{error}");
            }
        });
    }
    Ok(())
}
