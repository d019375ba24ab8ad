/* A ring buffer of bytes between one producer and one consumer in the same thread. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct ring {
    uint8_t *data;
    size_t capacity;
    size_t head; /* where the next byte is read */
    size_t used;
};

/* A ring of `capacity` bytes; NULL if there is no memory for it, or if it is 0. */
struct ring *ring_new(size_t capacity)
{
    if (capacity == 0) {
        return NULL;
    }
    struct ring *ring = malloc(sizeof *ring);
    if (ring == NULL) {
        return NULL;
    }
    ring->data = malloc(capacity);
    if (ring->data == NULL) {
        free(ring);
        return NULL;
    }
    ring->capacity = capacity;
    ring->head = 0;
    ring->used = 0;
    return ring;
}

void ring_free(struct ring *ring)
{
    if (ring == NULL) {
        return;
    }
    free(ring->data);
    free(ring);
}

size_t ring_space(const struct ring *ring)
{
    return ring->capacity - ring->used;
}

/* Append as many of the `length` bytes as there is space for; returns how many. */
size_t ring_write(struct ring *ring, const uint8_t *bytes, size_t length)
{
    size_t space = ring_space(ring);
    if (length > space) {
        length = space;
    }
    size_t tail = (ring->head + ring->used) % ring->capacity;
    size_t first = ring->capacity - tail;
    if (first > length) {
        first = length;
    }
    memcpy(ring->data + tail, bytes, first);
    memcpy(ring->data, bytes + first, length - first);
    ring->used += length;
    return length;
}

/* Copy up to `length` bytes without taking them; returns how many. */
size_t ring_peek(const struct ring *ring, uint8_t *bytes, size_t length)
{
    if (length > ring->used) {
        length = ring->used;
    }
    size_t first = ring->capacity - ring->head;
    if (first > length) {
        first = length;
    }
    memcpy(bytes, ring->data + ring->head, first);
    memcpy(bytes + first, ring->data, length - first);
    return length;
}

/* Take up to `length` bytes; returns how many. */
size_t ring_read(struct ring *ring, uint8_t *bytes, size_t length)
{
    length = ring_peek(ring, bytes, length);
    ring->head = (ring->head + length) % ring->capacity;
    ring->used -= length;
    return length;
}

/* Find a byte; its distance from the head is stored in `at` if it is there. */
bool ring_find(const struct ring *ring, uint8_t wanted, size_t *at)
{
    for (size_t i = 0; i < ring->used; i++) {
        if (ring->data[(ring->head + i) % ring->capacity] == wanted) {
            *at = i;
            return true;
        }
    }
    return false;
}
