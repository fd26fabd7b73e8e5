(** Training LoRA on W_d and a block_out adapter together

    LoRA adds B A to W_d; the adapter adds Up ψ(Down h) to the block output h, ψ any
    function.  The block output is s + W_d m: skip part s, hidden activation m.

    Claims.
      - Down B = 0: the adapter answers as if LoRA were absent, so the two shifts add.
      - For injective ψ and Up of full column rank, Down B A = 0 is also necessary.
      - Down (1 - V V^T), with orthonormal columns V spanning col(B), satisfies
        Down B = 0, and leaves Down alone if Down V = 0 already.
      - Up^T B = 0: the two shifts are orthogonal and their squared norms add.

    Assumptions.  One block; LoRA on W_d only; s and m the same with and without LoRA.

    Not said here.  LoRA on other matrices, later blocks, and a norm after the MLP are
    outside this.  A projection holds when it is applied, not after the next step of
    an optimizer. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section Joint.
Variables (F : fieldType) (d n r k : nat) (psi : 'cV[F]_k -> 'cV[F]_k).
Variables (Wd : 'M[F]_(d, n)) (A : 'M[F]_(r, n)) (B : 'M[F]_(d, r)).
Variables (Down : 'M[F]_(k, d)) (Up : 'M[F]_(d, k)).
Implicit Types (s : 'cV[F]_d) (m : 'cV[F]_n).

(** Shift of the adapter: Up ψ(Down h). *)
Definition adapter (h : 'cV[F]_d) : 'cV[F]_d := Up *m psi (Down *m h).

(** Block output without LoRA. *)
Definition block s m := s + Wd *m m.

(** Block output with LoRA. *)
Definition block_lora s m := s + (Wd + B *m A) *m m.

(** Down B = 0: the adapter does not see LoRA. *)
Theorem no_interference s m : Down *m B = 0 ->
  adapter (block_lora s m) = adapter (block s m).
Proof.
move=> DB0; rewrite /adapter /block_lora mulmxDl addrA mulmxDr -!mulmxA.
by rewrite [Down *m (B *m _)]mulmxA DB0 mul0mx addr0.
Qed.

(** Down B = 0: total shift = LoRA shift + adapter shift. *)
Theorem shifts_add s m : Down *m B = 0 ->
  block_lora s m + adapter (block_lora s m) - block s m
    = B *m A *m m + adapter (block s m).
Proof.
move=> DB0; rewrite no_interference // /block_lora mulmxDl addrA addrAC.
by rewrite [_ - _]addrAC subrr add0r.
Qed.

(** If the adapter never sees LoRA then Down B A = 0. *)
Theorem no_interference_necessary :
    injective psi -> row_free Up^T ->
    (forall s m, adapter (block_lora s m) = adapter (block s m)) ->
  Down *m B *m A = 0.
Proof.
move=> psi_inj Up_free E; apply/matrixP=> i j.
have := E 0 (delta_mx j 0); rewrite /adapter /block_lora /block !add0r.
move/(congr1 trmx); rewrite !trmx_mul => /(row_free_inj Up_free)/trmx_inj/psi_inj.
rewrite mulmxDl mulmxDr => /(canRL (addKr _)); rewrite addNr !mulmxA -colE.
by move=> /(congr1 (fun v : 'cV_k => v i 0)); rewrite !mxE.
Qed.
End Joint.

Section Projection.
Variables (R : realFieldType) (d r k : nat).
Variables (B V : 'M[R]_(d, r)) (Down : 'M[R]_(k, d)).

(** Down (1 - V V^T) *)
Definition project : 'M[R]_(k, d) := Down *m (1%:M - V *m V^T).

(** The projected Down satisfies Down B = 0. *)
Theorem project_meets_constraint :
  V^T *m V = 1%:M -> in_colspan B V -> project *m B = 0.
Proof.
move=> VV /colspanP[x ->]; rewrite /project -mulmxA mulmxBl mul1mx -!mulmxA.
by rewrite (mulmxA V^T) VV mul1mx subrr mulmx0.
Qed.

(** Rows already orthogonal to col(V) are unchanged. *)
Theorem project_fixes : Down *m V = 0 -> project = Down.
Proof. by move=> DV; rewrite /project mulmxBr mulmx1 mulmxA DV mul0mx subr0. Qed.

(** Up^T B = 0: ||B e + Up c||^2 = ||B e||^2 + ||Up c||^2. *)
Theorem shifts_pythagoras (Up : 'M[R]_(d, k)) (c : 'cV_k) (e : 'cV_r) :
  Up^T *m B = 0 -> sqn (B *m e + Up *m c) = sqn (B *m e) + sqn (Up *m c).
Proof.
move=> UB; rewrite addrC sqnD_orth 1?addrC // /dot trmx_mul -mulmxA.
by rewrite (mulmxA Up^T) UB mul0mx mulmx0 mxE.
Qed.
End Projection.
