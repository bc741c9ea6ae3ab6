//! Where mutation starts: the frames of the packet fixtures, and the worlds and hooks that they come in at.

use std::collections::{BTreeMap, BTreeSet};

use super::random::Random;
use crate::packet::world::World;
use crate::packet::{Hook, fixtures};

/// All of it.
#[derive(Debug)]
pub struct Starts {
    worlds: Vec<World>,
    places: Vec<Place>,
    /// Every frame of the fixtures, as it comes in or goes out.
    frames: Vec<Vec<u8>>,
}

/// A hook in a world.
#[derive(Debug)]
struct Place {
    world: usize,
    hook: Hook,
    segment_len: u32,
    /// The fixtures' frames that come in here.
    frames: Vec<Vec<u8>>,
}

/// One hook in one world, for a number of packets.
#[derive(Debug, Clone, Copy)]
pub struct Stand<'s> {
    /// What the tables hold.
    pub world: &'s World,
    /// Where the packets come in.
    pub hook: Hook,
    /// Bytes of payload in each segment that the packets will be cut into; 0: they won't be.
    pub segment_len: u32,
    own: &'s [Vec<u8>],
    all: &'s [Vec<u8>],
}

impl Starts {
    /// Those of all fixtures.
    pub fn of_fixtures() -> Self {
        let mut worlds = BTreeMap::new();
        let mut places: BTreeMap<_, Place> = BTreeMap::new();
        let mut frames = BTreeSet::new();
        let mut all_worlds = Vec::new();
        for fixture in fixtures::all() {
            frames.insert(fixture.input.clone());
            frames.insert(fixture.outcome.output.clone());
            let (hook, segment_len) = (fixture.hook, fixture.segment_len);
            let world = *worlds.entry(format!("{:?}", fixture.world)).or_insert(all_worlds.len());
            if world == all_worlds.len() {
                all_worlds.push(fixture.world);
            }
            let place = places.entry((world, format!("{hook:?}"), segment_len));
            let place = place.or_insert_with(|| Place { world, hook, segment_len, frames: vec![] });
            place.frames.push(fixture.input);
        }
        frames.retain(|frame| !frame.is_empty());
        Self {
            worlds: all_worlds,
            places: places.into_values().collect(),
            frames: frames.into_iter().collect(),
        }
    }

    /// How many hooks and worlds belong together.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is no fixture.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// One of them; numbers from [`Starts::len`] on begin anew.
    pub fn stand(&self, number: usize) -> Stand<'_> {
        let Place { world, hook, segment_len, frames } = &self.places[number % self.places.len()];
        Stand {
            world: &self.worlds[*world],
            hook: *hook,
            segment_len: *segment_len,
            own: frames,
            all: &self.frames,
        }
    }

    /// Every frame of the fixtures, as it comes in or goes out.
    pub fn frames(&self) -> &[Vec<u8>] {
        &self.frames
    }
}

impl<'s> Stand<'s> {
    /// A frame to begin with: mostly one that a fixture sends in here.
    pub fn frame(&self, random: &mut Random) -> &'s [u8] {
        let of = if random.one_in(4) { self.all } else { self.own };
        random.pick::<Vec<u8>>(of)
    }

    /// The frames that fixtures send in here.
    pub const fn own(&self) -> &'s [Vec<u8>] {
        self.own
    }

    /// Any frame.
    pub fn other(&self, random: &mut Random) -> &'s [u8] {
        random.pick::<Vec<u8>>(self.all)
    }
}
