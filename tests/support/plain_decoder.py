"""A second, deliberately naive implementation of FORMAT.md, from that page alone: loops, no tables, no numpy."""

import math
import struct
import zlib

ID_LIMIT = 2**18


def code_probability(code):
    """p(q) of a present code, q = 1 … 255."""
    return math.sin(math.pi * code / 510) ** 6


def token_id(low, packed_high, entry):
    """The id of one entry, counted over the whole row."""
    high = (packed_high[entry // 4] >> (2 * (entry % 4))) & 0b11
    return low[entry] | high << 16


def present_entries(codes, low, packed_high, first, count):
    """(id, probability of its code) of the entries first … first + count − 1, without the absent ones."""
    found = []
    for entry in range(first, first + count):
        if codes[entry] != 0:
            found.append((token_id(low, packed_high, entry), code_probability(codes[entry])))
    return found


def decode_position(row, index, top_k, num_sampled):
    """What is stored for the extracted token number `index` of a row."""
    nucleus = present_entries(
        row["top_logits_quantized"], row["top_indices_low"], row["top_indices_high"], index * top_k, top_k
    )
    draws = present_entries(
        row["sampled_logits_quantized"],
        row["sampled_indices_low"],
        row["sampled_indices_high"],
        index * num_sampled,
        num_sampled,
    )
    total = 0.0
    for _, probability in nucleus:
        total += probability
    tail_mass = max(0.0, 1.0 - total)
    sampled = {}
    for drawn_id, probability in draws:
        _, weight = sampled.get(drawn_id, (probability, 0.0))
        sampled[drawn_id] = (probability, weight + tail_mass / num_sampled)
    return {"nucleus": nucleus, "sampled": sampled, "tail_mass": tail_mass}


def numbers_of_row(row, target_ids, top_k, num_sampled):
    """The four numbers of a row whose extracted tokens are `target_ids`."""
    n = row["num_tokens"]
    surprisal = entropy = 0.0
    first = 0
    for index in range(n):
        position = decode_position(row, index, top_k, num_sampled)
        surprisal -= row["token_log_probs"][index]
        for _, probability in position["nucleus"]:
            entropy -= probability * math.log(probability)
        for probability, weight in position["sampled"].values():
            entropy -= weight * math.log(probability)
        first += bool(position["nucleus"]) and position["nucleus"][0][0] == target_ids[index]
    return {
        "mean_nll": surprisal / n,
        "mean_entropy": entropy / n,
        "top1_rate": first / n,
        "max_surprisal": -min(row["token_log_probs"]),
    }


def clip(value, lowest, highest):
    return max(lowest, min(highest, value))


def nearest_code(p):
    """The code that a probability in [0, 1] is rounded to."""
    return clip(round(510 / math.pi * math.asin(p ** (1 / 6))), 1, 255)


def carried_codes(probabilities, top_p):
    """The codes of one position's entries, most probable first; 0 for those after the nucleus."""
    codes = []
    total_before = 0.0
    carry = 0.0
    for p in probabilities:
        if total_before < top_p or top_p == 1:
            plain = nearest_code(p)
            code = clip(nearest_code(clip(p + carry, 0.0, 1.0)), plain - 1, plain + 1)
            code = clip(code, 1, 255)
            carry += p - code_probability(code)
            codes.append(code)
        else:
            codes.append(0)
        total_before += p
    return codes


def first_above(probabilities, candidates, threshold):
    """The first candidate whose running total is above the threshold, else the last one with p > 0."""
    total = 0.0
    last_possible = None
    for candidate in candidates:
        total += probabilities[candidate]
        if total > threshold:
            return candidate
        if probabilities[candidate] > 0:
            last_possible = candidate
    return last_possible


def systematic_draws(probabilities, excluded, u, num_sampled):
    """The ids drawn from the tail with one uniform u, or None when the tail is empty; `excluded` is the nucleus."""
    candidates = [i for i in range(min(len(probabilities), ID_LIMIT)) if i not in excluded]
    tail = 0.0
    for candidate in candidates:
        tail += probabilities[candidate]
    if tail == 0:
        return None
    return [first_above(probabilities, candidates, (u + j) / num_sampled * tail) for j in range(num_sampled)]


def checksum(input_ids, positions):
    """CRC-32 over the input ids and then the positions, each as a little-endian uint32."""
    numbers = [*input_ids, *positions]
    return zlib.crc32(b"".join(struct.pack("<I", number) for number in numbers))
