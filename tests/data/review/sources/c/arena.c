/* An arena: many small allocations that are given back together. */

#include <stdalign.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ARENA_BLOCK_SIZE ((size_t)16 * 1024)

struct arena_block {
    struct arena_block *next;
    size_t size;
    size_t used;
    alignas(max_align_t) unsigned char data[];
};

struct arena {
    struct arena_block *blocks; /* the newest first */
    size_t total;               /* bytes handed out, padding included */
};

void arena_init(struct arena *arena)
{
    arena->blocks = NULL;
    arena->total = 0;
}

static struct arena_block *arena_grow(struct arena *arena, size_t size)
{
    size_t capacity = size > ARENA_BLOCK_SIZE ? size : ARENA_BLOCK_SIZE;
    if (capacity > SIZE_MAX - sizeof(struct arena_block)) {
        return NULL;
    }
    struct arena_block *block = malloc(sizeof *block + capacity);
    if (block == NULL) {
        return NULL;
    }
    block->size = capacity;
    block->used = 0;
    block->next = arena->blocks;
    arena->blocks = block;
    return block;
}

/* `size` bytes, aligned for any type; NULL if there is no memory. */
void *arena_alloc(struct arena *arena, size_t size)
{
    const size_t alignment = alignof(max_align_t);
    if (size > SIZE_MAX - alignment) {
        return NULL;
    }
    size = (size + alignment - 1) & ~(alignment - 1);
    struct arena_block *block = arena->blocks;
    if (block == NULL || block->size - block->used < size) {
        block = arena_grow(arena, size);
        if (block == NULL) {
            return NULL;
        }
    }
    void *memory = block->data + block->used;
    block->used += size;
    arena->total += size;
    return memory;
}

/* An array of zeros; NULL if there is no memory or its size cannot be expressed. */
void *arena_calloc(struct arena *arena, size_t count, size_t size)
{
    if (size != 0 && count > SIZE_MAX / size) {
        return NULL;
    }
    void *memory = arena_alloc(arena, count * size);
    if (memory != NULL) {
        memset(memory, 0, count * size);
    }
    return memory;
}

/* A copy of the first `length` bytes of `text`, with a zero at its end. */
char *arena_strndup(struct arena *arena, const char *text, size_t length)
{
    if (length == SIZE_MAX) {
        return NULL;
    }
    char *copy = arena_alloc(arena, length + 1);
    if (copy != NULL) {
        memcpy(copy, text, length);
        copy[length] = '\0';
    }
    return copy;
}

/* Give everything back; the arena can be used again. */
void arena_release(struct arena *arena)
{
    struct arena_block *block = arena->blocks;
    while (block != NULL) {
        struct arena_block *next = block->next;
        free(block);
        block = next;
    }
    arena_init(arena);
}
